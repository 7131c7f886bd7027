"""An async run with parameters, all policies, a session, the current run."""

from collections.abc import Sequence
from datetime import date, datetime, timedelta
from typing import assert_type

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from batch_system import (
    BaseTask,
    CurrentRun,
    DomainError,
    Missed,
    Retry,
    TaskRegistry,
    current_run,
    get_db,
    get_logger,
)
from service.application.models import User

logger = get_logger(__name__)


class NoSlot(DomainError):
    pass


@TaskRegistry.register
class SignupsTask(BaseTask):
    """Count the users who signed up on the day before."""

    name = "signups"
    description = "Count who signed up"
    schedule = "15 6 * * 1-5"
    timezone = "Europe/Berlin"
    timeout = timedelta(minutes=5)
    retry = Retry(attempts=3, wait=timedelta(seconds=10), max_wait=600, on=(OSError, NoSlot))
    missed = Missed("all", max_age=timedelta(days=7), max_count=5)
    overlap = "allow"
    priority = 10

    async def run(
        self, slot: datetime, day: date | None = None, dry_run: bool = False
    ) -> dict[str, int | str]:
        run = assert_type(current_run(), CurrentRun)
        assert_type(run.previous_slot, datetime | None)
        day = day or slot.date() - timedelta(days=1)
        start = datetime.combine(day, datetime.min.time(), slot.tzinfo)
        async with get_db(readonly=True) as db:
            assert_type(db, AsyncSession)
            count = await db.scalar(select(func.count(User.id)).where(User.created_at >= start))
            users = assert_type((await db.scalars(select(User))).all(), Sequence[User])
        for done, user in enumerate(users):
            run.checkpoint()
            run.progress(done + 1, len(users))
            logger.info("%s signed up", user.email, attempt=run.attempt, origin=run.origin)
        if not dry_run:
            async with get_db() as db:
                db.add(User(email=f"{run.id}@example.com"))
                await db.commit()
        return {"day": day.isoformat(), "count": count or 0}


assert_type(SignupsTask, type[SignupsTask])
