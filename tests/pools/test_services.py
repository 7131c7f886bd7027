"""Process pools in real processes: a service or a worker whose runs execute in children, and the
effects of kills.
"""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from batch_system.batch.ledger import run_logs, tables
from batch_system.database.engine import Database
from tests.batch.ledger_world import rows, until
from tests.batch.test_runs import NOW, insert, new
from tests.databases import application_with_done, items_done
from tests.faults.nodes import children_of
from tests.pools.world import is_alive, until_gone
from tests.processes import BATCH, Service, batch, process, service

SETTINGS = {
    "POLL_SECONDS": "0.1",
    "DRAIN_SECONDS": "5",
    "HEARTBEAT_SECONDS": "0.3",
    "LEASE_SECONDS": "2",
    "BATCH_POOL_CPU": "process:2",
}

TASKS = """
import asyncio, os, time
from batch_system import BaseTask, Retry, current_run, get_logger
from sqlalchemy import text

logger = get_logger("authors")

class Long(BaseTask):
    name, schedule, pool, retry = "long", None, "cpu", Retry(attempts=2, wait=0)
    async def run(self) -> int:
        logger.info("begins", pid=os.getpid())
        async for chunk in self.chunks(range(40), size=1):
            async with chunk as (db, items):
                await db.execute(text("INSERT INTO done (item) VALUES (:item)"), {"item": items[0]})
            await asyncio.sleep(0.04)
            while os.path.exists("hold"):
                await asyncio.sleep(0.01)
        return os.getpid()

class Spinning(BaseTask):
    name, schedule, pool, timeout = "spinning", None, "cpu", 600
    async def run(self) -> None:
        logger.info("begins", pid=os.getpid())
        while True:
            pass

class Tick(BaseTask):
    name, schedule = "tick", "* * * * * *"
    async def run(self) -> None:
        pass

class Hog(BaseTask):
    name, schedule, pool, memory = "hog", None, "cpu", "120 MiB"
    def run(self) -> None:
        logger.info("begins", pid=os.getpid())
        taken = []
        while True:
            taken.append(bytearray(1_000_000))
"""


class Place:
    """A folder with tasks, and two databases that services and workers share."""

    def __init__(self, folder: Path, ledger: Database, application: str, stack: ExitStack) -> None:
        self.folder, self.ledger, self._stack = folder, ledger, stack
        (folder / "tasks").mkdir(parents=True)
        (folder / "tasks/all.py").write_text(TASKS)
        url = ledger.url.render_as_string(hide_password=False)
        self.settings = {**SETTINGS, "LEDGER_URL": url, "DATABASE_URL": application}

    def serve(self, **settings: str) -> Service:
        return self._stack.enter_context(
            service(self.folder, settings={**self.settings, **settings})
        )

    def work(self) -> Service:
        worker = self._stack.enter_context(
            process(self.folder, (*BATCH, "work", "--pool", "cpu"), self.settings)
        )
        worker._wait_until(lambda: "of other pools" in worker.stdout, "has not begun")
        return worker

    async def queue(self, task: str) -> str:
        run = new(task)
        await insert(self.ledger, run)
        return run.id

    async def pid(self, run: str) -> int:
        """Wait until the child of a run has logged its process id."""

        async def logged() -> list[int]:
            async with self.ledger.reader.connect() as connection:
                lines = await run_logs.tail(connection, run, 1_000)
            return [
                int(line.text.rpartition("pid=")[2]) for line in lines if "begins pid=" in line.text
            ]

        return int((await until(logged))[-1])

    async def ended(self, run: str) -> dict[str, Any]:
        async def over() -> dict[str, Any] | None:
            (row,) = await rows(self.ledger, id=run)
            return row if row["state"] in ("succeeded", "failed", "cancelled") else None

        return dict(await until(over))

    async def done(self) -> list[int]:
        """The items that runs of `long` have committed. The table refuses an item that is there
        already.
        """
        return await items_done(self.settings["DATABASE_URL"])


@pytest.fixture
async def place(ledger: Database, tmp_path: Path) -> Any:
    application = await application_with_done(ledger, tmp_path)
    seen = {
        "first_seen_at": NOW,
        "last_seen_at": NOW,
        "policies": {},
        "description": "",
        "source": "tasks/all.py",
    }
    async with ledger.engine.begin() as connection:
        about = [{"name": name, "pool": "cpu", **seen} for name in ("long", "spinning", "hog")]
        await connection.execute(tables.tasks.insert(), about)
    with ExitStack() as stack:
        yield Place(tmp_path / "place", ledger, application, stack)


@pytest.mark.rest
async def test_a_killed_child_fails_its_attempt_and_the_next_one_goes_on_after_its_last_chunk(
    place: Place,
) -> None:
    place.serve()
    run = await place.queue("long")
    child = await place.pid(run)
    await until(place.done)
    os.kill(child, signal.SIGKILL)
    row = await place.ended(run)
    assert (row["state"], row["attempt"], await place.done()) == ("succeeded", 2, list(range(40)))
    assert row["result"] != child
    first, _ = await rows(place.ledger, tables.attempts, run=run)
    assert (first["outcome"], first["error"]["message"]) == (
        "failed",
        "killed by signal 9 (SIGKILL)",
    )


@pytest.mark.rest
async def test_a_nursery_that_is_killed_interrupts_its_runs_which_are_resumed(place: Place) -> None:
    served = place.serve()
    run = await place.queue("long")
    child = await place.pid(run)
    await until(place.done)
    (nursery,) = [pid for pid in children_of(served.process.pid) if child in children_of(pid)]
    os.kill(nursery, signal.SIGKILL)
    row = await place.ended(run)
    assert (row["state"], row["attempt"], await place.done()) == ("succeeded", 1, list(range(40)))
    (first, _) = await rows(place.ledger, tables.attempts, run=run)
    assert first["outcome"] == "interrupted"
    await until_gone(nursery, child)


@pytest.mark.rest
@pytest.mark.parametrize("kind", ["service", "worker"])
async def test_the_children_of_a_process_that_is_killed_end_with_it_and_their_runs_are_resumed(
    place: Place, kind: str
) -> None:
    first = place.work() if kind == "worker" else place.serve()
    run = await place.queue("long")
    await place.pid(run)
    await until(place.done)
    left = children_of(first.process.pid)
    assert left
    first.process.kill()
    await until_gone(*left)
    place.serve()
    row = await place.ended(run)
    assert (row["state"], row["attempt"], await place.done()) == ("succeeded", 1, list(range(40)))


@pytest.mark.rest
async def test_a_drain_interrupts_a_child_after_its_chunk_and_nothing_is_left(place: Place) -> None:
    served = place.serve()
    run = await place.queue("long")
    await place.pid(run)
    await until(place.done)
    left = children_of(served.process.pid)
    served.stop(within=8)
    assert served.process.returncode == -signal.SIGTERM
    await until_gone(*left)
    (row,) = await rows(place.ledger, id=run)
    assert (row["state"], row["reason"]) == ("interrupted", "the service stops")
    place.serve()
    assert ((await place.ended(run))["attempt"], await place.done()) == (1, list(range(40)))


@pytest.mark.rest
async def test_a_run_that_never_stops_is_cancelled_by_a_kill_and_harms_no_other_run(
    place: Place,
) -> None:
    """Its child spins in a coroutine, where a cancel is never seen, while a task of the service
    runs each second.
    """
    place.serve()
    run = await place.queue("spinning")
    child = await place.pid(run)
    assert batch(place.folder, "cancel", run, settings=place.settings).returncode == 0
    row = await place.ended(run)
    assert (row["state"], is_alive(child)) == ("cancelled", False)
    ticks = await rows(place.ledger, task="tick", state="succeeded")
    late = [(each["started_at"] - each["slot"]).total_seconds() for each in ticks]
    assert len(late) >= 4
    assert max(late) < 3  # the child spins for 5 seconds before it is killed


async def test_a_task_that_takes_all_memory_has_failed_with_that_reason(place: Place) -> None:
    place.serve()
    run = await place.queue("hog")
    row = await place.ended(run)
    assert (row["state"], row["reason"]) == ("failed", "used more than 120 MiB")


@pytest.mark.rest
async def test_a_pause_lets_a_child_stop_after_its_chunk_and_a_resume_goes_on(place: Place) -> None:
    hold = place.folder / "hold"
    hold.touch()  # so that the run goes on until the command has paused its task
    place.serve()
    run = await place.queue("long")
    await place.pid(run)
    await until(place.done)
    assert batch(place.folder, "pause", "long", settings=place.settings).returncode == 0
    hold.unlink()
    await until(lambda: rows(place.ledger, id=run, state="interrupted"))
    assert batch(place.folder, "resume", "long", settings=place.settings).returncode == 0
    assert ((await place.ended(run))["state"], await place.done()) == ("succeeded", list(range(40)))
