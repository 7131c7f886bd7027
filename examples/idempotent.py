"""A task that does its work only once for each day, even if it runs again: by hand, after a crash,
or late.

This needs two things. The day is that of the slot, not today: a run that is late, or resumed after
midnight, still processes the day for which it was due. And the mark that a day was processed is
committed together with the work, so that one never exists without the other.
"""

from datetime import date, datetime, timedelta

from sqlalchemy import Column, Date, MetaData, String, Table, insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from batch_system import BaseTask, TaskRegistry, get_db, get_logger
from service.application.models import Session

logger = get_logger(__name__)

# The first run creates the table, so that this file works by itself. Your own tables belong in
# service/application/models.py, and a migration creates them. Because of the primary key, only one
# of two runs can commit.
processed_days = Table(
    "processed_days",
    MetaData(),
    Column("task", String(100), primary_key=True),
    Column("day", Date, primary_key=True),
)


class IdempotentTask(BaseTask):
    """Extend the sessions that are open at the slot by a day, once for each day."""

    name = "idempotent_task"
    description = "Extend open sessions by a day, once for each day"
    schedule = "0 8 * * *"

    async def run(self, slot: datetime) -> int:
        day = slot.date()  # in the task's time zone
        async with get_db() as db:
            await (await db.connection()).run_sync(processed_days.create, checkfirst=True)
            if await self._is_already_processed(db, day):
                logger.info(f"Already processed for {day}")
                return 0
            count = await self._process(db, slot)
            await self._mark_as_processed(db, day)
            await db.commit()  # commits the work and the mark together
        logger.info(f"Extended {count} sessions for {day}")
        return count

    async def _is_already_processed(self, db: AsyncSession, day: date) -> bool:
        mark = select(processed_days.c.day).where(
            processed_days.c.task == self.name, processed_days.c.day == day
        )
        return await db.scalar(mark) is not None

    async def _process(self, db: AsyncSession, slot: datetime) -> int:
        """Extend the sessions. If this were done twice for a day, each session would be extended by
        two days.
        """
        sessions = (await db.scalars(select(Session).where(Session.expires_at > slot))).all()
        for session in sessions:
            session.expires_at += timedelta(days=1)
        return len(sessions)

    async def _mark_as_processed(self, db: AsyncSession, day: date) -> None:
        await db.execute(insert(processed_days).values(task=self.name, day=day))


TaskRegistry.register(IdempotentTask)
