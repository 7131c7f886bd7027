"""The application's database is away and the ledger is not: 200 tasks fail with one error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from batch_system.batch.incidents.problem import FEWEST
from batch_system.testing.databases import wait_for
from batch_system.testing.postgres import OwnServer, find_binaries
from tests.days.story import TWELVE, Story

pytestmark = pytest.mark.days

READER = """

class Reader{number}(BaseTask):
    name, schedule = "reader{number}", "*/30 * * * * *"

    async def run(self):
        from sqlalchemy import text

        from batch_system import get_db

        async with get_db() as db:
            await db.execute(text("SELECT 1"))
"""


def test_200_tasks_fail_with_one_error_which_is_one_problem(
    server: OwnServer, tmp_path: Path
) -> None:
    """What needs no database goes on, and one message says what is wrong with all others."""
    readers = "".join(READER.format(number=number) for number in range(200))
    with OwnServer(find_binaries(), fast=True) as other:
        settings = {
            "DATABASE_URL": wait_for(other.create_database()),
            "LEDGER_URL": wait_for(server.create_database()),
        }
        with Story(tmp_path / "story", settings, TWELVE + readers) as story:
            story.start("a", "b")
            story.until(lambda: len(story.ended_since(0)) >= 12, 30, "all run")
            other.stop("immediate")
            story.wait(100)
            since = story.now()
            story.until(lambda: len(story.ended_since(since)) >= 12, 30, "the others go on")
            status = story.until(
                lambda: one_problem(story), 50, lambda: story.batch("status", code=None)
            )
            assert len(status.splitlines()) < 40, status
            other.start()
            story.wait(45)
            story.check_end()
            error = "FileNotFoundError: [Errno 2] No such file or directory"
            told = re.sub(r"failed \d+ tasks", "failed N tasks", story.told())
            told = re.sub(r"failed reader\d+", "failed one reader", told)
            lines = told.splitlines()
            # Up to four tasks whose next run came later than the first message about the end are
            # named one by one in the second.
            late = lines.count(f"closed failed one reader: {error}")
            assert set(lines) - {f"closed failed one reader: {error}"} == {
                f"opened failed N tasks: {error}",
                f"closed failed N tasks: {error}",
            }
            assert late < FEWEST
            assert "Nothing needs you" in story.status()


def one_problem(story: Story) -> str:
    """What `batch status` says, once it knows of all 200 that they have failed with one error."""
    status = story.batch("status", code=1)
    return status if "200 tasks failed with one error" in status else ""
