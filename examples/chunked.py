"""Process many rows in chunks. Each chunk commits its changes together with the position of the
loop.

Rows are read by key: "the next 100 after the last key". OFFSET would be wrong, because the loop
changes the rows: when 100 sessions have been ended they no longer match, the other rows move up,
and OFFSET 100 would skip the next 100.

Memory holds one chunk, and SQLite's write lock is free between chunks. A run that is stopped or
crashes continues after the last committed chunk.
"""

from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from batch_system import BaseTask, TaskRegistry, get_logger
from service.application.models import Session

logger = get_logger(__name__)

LONGEST = timedelta(days=30)


class ChunkedTask(BaseTask):
    """End the sessions that have been open for longer than 30 days."""

    name = "chunked_task"
    description = "End the sessions that have been open for longer than 30 days"
    schedule = "0 9 * * *"

    async def run(self, slot: datetime, size: int = 100) -> int:
        old = select(Session).where(Session.created_at < slot - LONGEST, Session.expires_at > slot)
        loop = self.chunks(old, key=Session.session_id, size=size, total=True)
        async for chunk in loop:
            async with chunk as (db, sessions):
                for session in sessions:
                    await self._end(db, session, slot)
        logger.info(f"Ended {loop.done} sessions")
        return loop.done

    async def _end(self, db: AsyncSession, session: Session, at: datetime) -> None:
        session.expires_at = at


TaskRegistry.register(ChunkedTask)
