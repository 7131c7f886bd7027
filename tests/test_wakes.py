"""Real processes of which one queues or cancels what another one executes. A look at the queue is due in 30 seconds."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

from service.database.engine import Database
from tests.batch.ledger_world import rows, until
from tests.processes import BATCH, SERVE, batch, process, service

TASKS = """
import asyncio
from service import BaseTask

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


async def test_what_one_process_asks_for_another_one_does_long_before_its_next_look(
    ledger: Database, tmp_path: Path
) -> None:
    (tmp_path / "tasks/all.py").write_text(TASKS)
    url = ledger.url.render_as_string(hide_password=False)
    settings = {"LEDGER_URL": url, "POLL_SECONDS": f"{POLL:g}", "BATCH_POOL_GPU": "nodes", "DRAIN_SECONDS": "0"}
    with ExitStack() as stack:
        stack.enter_context(service(tmp_path, SERVE, settings))
        worker = stack.enter_context(process(tmp_path, [*BATCH, "work", "--pool", "gpu"], settings))
        worker.wait_until_said("pool")
        for task in ("short", "heavy", "short", "heavy"):
            told = batch(tmp_path, "run", task, "--queue", settings=settings)
            assert told.returncode == 0, told.stderr
        ended = await until(lambda: all_of(ledger, 4))
        assert all(run["started_at"] - run["created_at"] < FAR_BELOW for run in ended)

        batch(tmp_path, "run", "long", "--queue", settings=settings)
        (run,) = await until(lambda: rows(ledger, task="long", state="running"))
        assert run["started_at"] - run["created_at"] < FAR_BELOW
        told = batch(tmp_path, "cancel", run["id"], settings=settings)
        assert told.returncode == 0, told.stderr
        (run,) = await until(lambda: rows(ledger, task="long", state="cancelled"))
        assert run["finished_at"] - run["cancel_at"] < FAR_BELOW
        told = batch(tmp_path, "retry", run["id"], settings=settings)
        assert told.returncode == 0, told.stderr
        (again,) = await until(lambda: rows(ledger, task="long", state="running"))
        assert again["attempt_started_at"] - again["due_at"] < FAR_BELOW


async def all_of(ledger: Database, number: int) -> list[dict[str, object]]:
    ended = await rows(ledger, state="succeeded")
    return ended if len(ended) == number else []
