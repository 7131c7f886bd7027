"""Real processes, of which one queues or cancels what another one executes. Without a wake a look
is due in 30 seconds.
"""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

from batch_system import clock
from batch_system.batch.ledger import tables
from batch_system.batch.queue import cancel, retry
from batch_system.database.engine import Database
from tests.batch.ledger_world import rows, until
from tests.batch.test_runs import insert, new
from tests.processes import BATCH, SERVE, process, service

TASKS = """
import asyncio
from batch_system import BaseTask

class Short(BaseTask):
    name, schedule = "short", None
    async def run(self) -> None: ...

class Heavy(Short):
    name, pool = "heavy", "gpu"

class Long(BaseTask):
    name, schedule = "long", None
    async def run(self) -> None:
        await asyncio.Event().wait()
"""

POLL = 30.0
FAR_BELOW = timedelta(seconds=POLL / 3)


async def test_a_process_does_what_another_one_asks_for_long_before_its_next_poll(
    ledger: Database, tmp_path: Path
) -> None:
    (tmp_path / "tasks/all.py").write_text(TASKS)
    url = ledger.url.render_as_string(hide_password=False)
    settings = {
        "LEDGER_URL": url,
        "POLL_SECONDS": f"{POLL:g}",
        "BATCH_POOL_GPU": "nodes",
        "DRAIN_SECONDS": "0",
    }
    with ExitStack() as stack:
        stack.enter_context(service(tmp_path, SERVE, settings))
        stack.enter_context(process(tmp_path, [*BATCH, "work", "--pool", "gpu"], settings))
        await until(lambda: rows(ledger, tables.nodes, fires=False))
        for task in ("short", "heavy", "short", "heavy"):
            await insert(ledger, new(task, created_at=clock.now(), exclusive=None))
        ended = await until(lambda: all_of(ledger, 4))
        assert all(run["started_at"] - run["created_at"] < FAR_BELOW for run in ended)

        long = new("long", created_at=clock.now())
        await insert(ledger, long)
        (run,) = await until(lambda: rows(ledger, id=long.id, state="running"))
        assert run["started_at"] - run["created_at"] < FAR_BELOW
        async with ledger.engine.begin() as connection:
            await cancel.request_cancel(connection, long.id, "cancelled by ann", "ann")
        (run,) = await until(lambda: rows(ledger, id=long.id, state="cancelled"))
        assert run["finished_at"] - run["cancel_at"] < FAR_BELOW
        async with ledger.engine.begin() as connection:
            await retry.retry(connection, long.id, "ann")
        (run,) = await until(lambda: rows(ledger, id=long.id, state="running"))
        assert run["attempt_started_at"] - run["due_at"] < FAR_BELOW


async def all_of(ledger: Database, number: int) -> list[dict[str, object]]:
    ended = await rows(ledger, state="succeeded")
    return ended if len(ended) == number else []
