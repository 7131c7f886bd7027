"""The ledger's server is away for longer than each timer, while another program goes on to commit
orders and the starts of their invoices.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from batch_system.testing.databases import wait_for
from batch_system.testing.postgres import OwnServer
from tests.days.story import MISSED, TWELVE, Story, down
from tests.days.test_server_away import AWAY_SECONDS
from tests.processes import environment

pytestmark = pytest.mark.days

INVOICE = '''

class Invoice(BaseTask):
    """A run for each order."""

    name, schedule, overlap = "invoice", None, "allow"

    async def run(self, order: int):
        note("began")
        note("ended")
'''
SHOP = """
import asyncio
import itertools

from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from batch_system import BaseTask, start


class Invoice(BaseTask):
    name, schedule, overlap = "invoice", None, "allow"

    async def run(self, order: int):
        raise AssertionError("this program executes no run")


async def main():
    sessions = async_sessionmaker(create_async_engine("sqlite+aiosqlite:///app.db"))
    async with sessions.begin() as db:
        await db.execute(text("CREATE TABLE orders (number INTEGER, run TEXT)"))
    for number in itertools.count():
        async with sessions() as db:
            run = await start(Invoice, order=number, session=db)
            await db.execute(
                text("INSERT INTO orders VALUES (:number, :run)"), {"number": number, "run": run}
            )
            await (db.rollback() if number % 3 == 0 else db.commit())
        await asyncio.sleep(0.1)


asyncio.run(main())
"""


def test_each_committed_order_has_one_invoice(server: OwnServer, tmp_path: Path) -> None:
    """The program never waits for the ledger. One service is killed when the ledger is back."""
    settings = {"LEDGER_URL": wait_for(server.create_database())}
    with Story(tmp_path / "story", settings, TWELVE + INVOICE) as story:
        story.start("a", "b")
        (story.folder / "shop.py").write_text(SHOP)
        shop = subprocess.Popen(
            [sys.executable, "shop.py"], cwd=story.folder, env=environment(story.settings)
        )
        try:
            story.until(lambda: story.count_runs("invoice", "succeeded") > 10, 30, "invoices run")
            server.stop("immediate")
            before = count(story)
            story.wait(AWAY_SECONDS)
            assert count(story) > before + AWAY_SECONDS
            server.start()
            story.wait(1)
            story.kill("b")
            story.wait(30)
        finally:
            shop.kill()
            shop.wait()
        story.check_end()
        ordered = {row["run"] for row in story.rows("SELECT run FROM orders", of="DATABASE_URL")}
        story.until(lambda: story.count_runs("invoice", "succeeded") == len(ordered), 30, "all run")
        made = story.rows("SELECT id FROM batch_runs WHERE task = 'invoice'")
        assert {str(row["id"]) for row in made} == ordered
        assert not story.rows("SELECT id FROM batch_starts", of="DATABASE_URL")
        story.check_told(down("its server can't be reached"), headline=MISSED)


def count(story: Story) -> int:
    """The number of committed orders."""
    return int(story.rows("SELECT count(*) AS n FROM orders", of="DATABASE_URL")[0]["n"])
