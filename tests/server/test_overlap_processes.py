"""Overlap between two processes: the run is active in one, the slot that replaces it or waits for
it is the other's.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from batch_system.batch.ledger import tables
from batch_system.database.engine import Database
from tests.batch.ledger_world import rows, until
from tests.processes import SERVE, process

SECONDS = 4.0
"""Two are promised, and on an idle machine it is one; others may keep this one busy."""

TASKS = """
import asyncio, os
from batch_system import BaseTask
from batch_system.batch.firing.dispatcher import Dispatcher

silent, notify = set(), Dispatcher.notify

def notify_unless_silent(self, name, slot=None):
    if name not in silent:
        notify(self, name, slot)

Dispatcher.notify = notify_unless_silent

class _Long(BaseTask):
    schedule = "*/2 * * * * *"

    async def run(self) -> None:
        # The process that runs it fires it no more: the next slot is the other process's.
        silent.add(self.name)
        while not os.path.exists(self.name):
            await asyncio.sleep(0.01)

class Replaced(_Long):
    name, overlap = "replaced", "replace"

class Waits(_Long):
    name, overlap = "waits", "wait"
"""


async def test_a_slot_that_another_process_fires_replaces_a_run_within_two_seconds_or_waits_for_it(
    ledger: Database, tmp_path: Path
) -> None:
    (tmp_path / "tasks/long.py").write_text(TASKS)
    settings = {
        "LEDGER_URL": ledger.url.render_as_string(hide_password=False),
        "POLL_SECONDS": "0.1",
    }
    with ExitStack() as stack:
        services = [stack.enter_context(process(tmp_path, SERVE, settings)) for _ in range(2)]
        for service in services:
            service.wait_until_ready()

        over = await one(ledger, task="replaced", state="cancelled", fence=1)
        new = await one(ledger, id=over["reason"].split()[1])
        assert (
            over["reason"]
            == f"run {new['id']} of slot {new['slot']:%Y-%m-%d %H:%M:%S} UTC replaced it"
        )
        assert (over["finished_at"] - new["created_at"]).total_seconds() < SECONDS
        assert [
            attempt["outcome"] for attempt in await rows(ledger, tables.attempts, run=over["id"])
        ] == ["cancelled"]
        began = await one(ledger, task="replaced", state="running")
        assert began["started_at"] >= over["finished_at"]

        skipped = await one(ledger, task="waits", state="skipped")
        first = await one(ledger, task="waits", state="running")
        second = await one(ledger, task="waits", state="queued")
        assert first["slot"] < second["slot"] < skipped["slot"]
        assert skipped["reason"].startswith(f"run {second['id']} of slot ")
        (tmp_path / "waits").touch()
        ended = await one(ledger, id=first["id"], state="succeeded")
        went = await one(ledger, id=second["id"], state="succeeded")
        assert 0 <= (went["started_at"] - ended["finished_at"]).total_seconds() < SECONDS


async def one(ledger: Database, **equal: Any) -> dict[str, Any]:
    """The first such run, once there is one."""
    return dict((await until(lambda: rows(ledger, **equal), 30))[0])
