"""Go through many rows a page at a time, and commit each page.

Pages go by key: "the next 100 after the last one". Never by OFFSET where the loop changes the rows: these sessions no
longer match once they are ended, the rest moves up, and OFFSET 100 would skip the 100 that took their places.

Memory holds one page, SQLite's write lock is free between pages, and what is committed stays done: a run that is
stopped at `checkpoint()`, or crashes, is resumed from the beginning of `run` and finds only the rest.
"""

from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from service import BaseTask, TaskRegistry, current_run, get_db, get_logger
from service.application.models import Session

logger = get_logger(__name__)

LONGEST = timedelta(days=30)


class ChunkedTask(BaseTask):
    """End the sessions that have been open for longer than 30 days."""

    name = "chunked_task"
    description = "End the sessions that have been open for longer than 30 days"
    schedule = "0 9 * * *"

    async def run(self, slot: datetime, size: int = 100) -> int:
        old = (Session.created_at < slot - LONGEST) & (Session.expires_at > slot)
        async with get_db(readonly=True) as db:
            total = await db.scalar(select(func.count()).where(old))

        last, ended = "", 0
        while True:
            current_run().checkpoint()
            following = select(Session).where(old, Session.session_id > last).order_by(Session.session_id).limit(size)
            async with get_db() as db:
                page = (await db.scalars(following)).all()
                for session in page:
                    await self._end(db, session, slot)
                await db.commit()
            if not page:
                break
            last = page[-1].session_id
            ended += len(page)
            current_run().progress(ended, total)
        logger.info(f"Ended {ended} sessions")
        return ended

    async def _end(self, db: AsyncSession, session: Session, at: datetime) -> None:
        session.expires_at = at


TaskRegistry.register(ChunkedTask)
