"""Counts the new users and sessions of the day before."""

from datetime import date, datetime, time, timedelta
from zoneinfo import ZoneInfo

from sqlalchemy import func, select

from batch_system import BaseTask, TaskRegistry, clock, get_db, get_logger
from service.application.models import Session, User

logger = get_logger(__name__)


class DailyReportTask(BaseTask):
    """Report the new users and sessions of the day before the slot, in the task's time zone."""

    name = "daily_report"
    description = "Report the new users and sessions of the day before"
    schedule = "0 1 * * *"

    async def run(
        self, day: date | None = None, slot: datetime | None = None
    ) -> dict[str, int | str]:
        zone = ZoneInfo(self.timezone)
        if day is None:
            day = (slot or clock.now()).astimezone(zone).date() - timedelta(days=1)
        start, end = (datetime.combine(d, time(), zone) for d in (day, day + timedelta(days=1)))
        async with get_db(readonly=True) as db:
            users = await db.scalar(
                select(func.count(User.id)).where(User.created_at >= start, User.created_at < end)
            )
            sessions = await db.scalar(
                select(func.count(Session.session_id)).where(
                    Session.created_at >= start, Session.created_at < end
                )
            )
        logger.info(f"Daily report for {day}: {users} users, {sessions} sessions")
        return {"day": day.isoformat(), "users": users or 0, "sessions": sessions or 0}


TaskRegistry.register(DailyReportTask)
