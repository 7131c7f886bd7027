"""Runs that start other runs, and sync runs that use the database."""

from datetime import UTC, date, datetime
from typing import assert_type

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from batch_system import BaseTask, call_async, call_db, get_logger, start
from service.application.models import User

from .signups import SignupsTask

logger = get_logger(__name__)


class StartsAnother(BaseTask):
    name = "starts_another"
    schedule = None

    async def run(self, day: date) -> str:
        run_id = await start(SignupsTask, key=f"signups-{day}", day=day, dry_run=True)
        await start(SignupsTask, slot=datetime(2026, 1, 1, tzinfo=UTC))
        return assert_type(run_id, str)


def count_users(db: Session) -> int:
    return db.scalar(select(func.count(User.id))) or 0


class SyncTask(BaseTask):
    name = "sync"
    schedule = "0 * * * *"

    def run(self) -> int:
        count = assert_type(call_db(count_users, readonly=True), int)
        emails = call_db(lambda db: list(db.scalars(select(User.email))))
        assert_type(emails, list[str])
        run_id = assert_type(call_async(start(SignupsTask, key="one")), str)
        try:
            return count + len(emails)
        except ZeroDivisionError as error:
            logger.error("can't be", exc_info=error, run_id=run_id)
            raise


class InChunks(BaseTask):
    name = "in_chunks"
    schedule = None

    async def run(self) -> int:
        numbers = self.chunks(range(5), size=2)
        async for chunk in numbers:
            async with chunk as (_, found):
                assert_type(found, list[int])
        return assert_type(numbers.done, int)
