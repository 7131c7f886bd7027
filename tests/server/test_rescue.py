"""kill -9: the runs of the process are resumed by its successor, or by a process beside it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.ledger import tables
from batch_system.batch.ledger.database_time import now_of
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.nodes import ledger_poll, process_lock
from batch_system.batch.nodes.orphans import rescue
from batch_system.database import lock_holder
from batch_system.database.engine import Database
from tests.batch.ledger_world import rows, until
from tests.processes import Service, service, suspend

TASK = """
import asyncio
from batch_system import BaseTask, current_run

class Long(BaseTask):
    name, schedule = "long", "* * * * * *"

    async def run(self) -> None:
        with open("started", "a") as file:
            file.write(current_run().id + "\\n")
        lines = open("started").read().splitlines()
        if lines == [current_run().id]:
            await asyncio.Event().wait()
"""
SETTINGS = {"HEARTBEAT_SECONDS": "0.3", "POLL_SECONDS": "0.1"}


def settings_for(ledger: Database) -> dict[str, str]:
    return {**SETTINGS, "LEDGER_URL": ledger.url.render_as_string(hide_password=False)}


async def running(ledger: Database, folder: Path) -> dict[str, Any]:
    """The run that goes on, once its body has begun: its row says so a moment earlier."""

    async def has_begun() -> bool:
        return (folder / "started").exists() and bool((folder / "started").read_text())

    await until(has_begun)
    (run,) = await rows(ledger, state="running")
    return run


async def kill(victim: Service) -> None:
    victim.process.send_signal(signal.SIGKILL)
    await asyncio.to_thread(victim.process.wait)


@pytest.mark.rest
async def test_the_next_start_resumes_what_was_running_at_a_kill(
    ledger: Database, tmp_path: Path
) -> None:
    (tmp_path / "tasks/long.py").write_text(TASK)
    with service(tmp_path, settings=settings_for(ledger)) as victim:
        lost = await running(ledger, tmp_path)
        await kill(victim)
    assert [run["id"] for run in await rows(ledger, state="running")] == [lost["id"]]
    with service(tmp_path, settings=settings_for(ledger)):
        (run,) = await until(lambda: rows(ledger, id=lost["id"], state="succeeded"))
        assert (run["attempt"], run["fence"]) == (1, 2)
        # And the task fires again: the lost run does not block its slots.
        await until(lambda: rows(ledger, state="succeeded", fence=1))
    attempts = await rows(ledger, tables.attempts, run=lost["id"])
    assert [(a["number"], a["outcome"]) for a in attempts] == [(1, "lost"), (1, "succeeded")]


async def test_a_node_beside_it_resumes_what_was_running_at_a_kill(
    ledger: Database, tmp_path: Path
) -> None:
    (tmp_path / "tasks/long.py").write_text(TASK)
    with service(tmp_path, settings=settings_for(ledger)) as victim:
        lost = await running(ledger, tmp_path)
        with service(tmp_path, settings=settings_for(ledger)):
            await kill(victim)
            # Long before the lease ends, which is 30 seconds.
            (run,) = await until(lambda: rows(ledger, id=lost["id"], state="succeeded"), 15)
            assert run["node"] != lost["node"]


FORKING = """
import asyncio, concurrent.futures, multiprocessing, time
from batch_system import BaseTask

class Pool(BaseTask):
    name, schedule = "pool", "* * * * * *"

    async def run(self) -> None:
        fork = multiprocessing.get_context("fork")
        pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=fork)
        future = pool.submit(time.sleep, 30)
        while not future.running():
            await asyncio.sleep(0.01)
        open("forked", "w").write(str(next(iter(pool._processes))))
        await asyncio.Event().wait()
"""


async def test_a_forked_child_that_lives_on_does_not_hide_that_its_node_is_dead(
    ledger: Database, tmp_path: Path
) -> None:
    (tmp_path / "tasks/pool.py").write_text(FORKING)
    with service(tmp_path, settings=settings_for(ledger)) as victim:

        async def has_forked() -> bool:
            return (tmp_path / "forked").exists() and bool((tmp_path / "forked").read_text())

        await until(has_forked)
        await kill(victim)
    child = int((tmp_path / "forked").read_text())

    async def rescued() -> list[str]:
        """Not at once where it was killed in a heartbeat, which PostgreSQL has yet to end."""
        async with ledger.engine.begin() as connection:
            return await rescue(
                connection, await gone(connection, ledger), await now_of(connection)
            )

    try:
        assert len(await until(rescued)) == 1
        assert [run["state"] for run in await rows(ledger)][:1] == ["interrupted"]
    finally:
        os.kill(child, signal.SIGKILL)


async def test_a_frozen_process_is_not_taken_for_dead(ledger: Database, tmp_path: Path) -> None:
    (tmp_path / "tasks/long.py").write_text(TASK)
    with service(tmp_path, settings=settings_for(ledger)) as frozen:
        held = await running(ledger, tmp_path)
        frozen.freeze(ledger.url)
        async with ledger.engine.begin() as connection:
            await rescue(connection, await gone(connection, ledger), await now_of(connection))
        assert [run["id"] for run in await rows(ledger, state="running")] == [held["id"]]
        os.kill(frozen.process.pid, signal.SIGCONT)


MANY = """
from batch_system import BaseTask

async def run(self) -> None: ...

for number in range(300):
    more = {"name": f"many-{number}", "schedule": "*/2 * * * * *", "run": run}
    more["__module__"] = __name__
    globals()[f"Many{number}"] = type(f"Many{number}", (BaseTask,), more)
"""


@pytest.mark.rest
@pytest.mark.parametrize("ledger_url", ["sqlite"], indirect=True)
async def test_a_process_that_is_frozen_with_the_lock_of_the_ledger_stops_the_others_for_a_lease(
    ledger: Database, tmp_path: Path
) -> None:
    """It is killed then. Most likely it holds the lock for slots of one instant, which it makes
    before they are due.
    """
    (tmp_path / "tasks/many.py").write_text(MANY)
    settings = settings_for(ledger) | {"LEASE_SECONDS": "2"}
    file = ledger.url.database or ""
    with (
        service(tmp_path, settings=settings) as victim,
        service(tmp_path, settings=settings) as other,
    ):
        give_up_at = clock.monotonic() + 60
        suspend(victim.process.pid)
        while lock_holder.of_write_lock(file) != victim.process.pid:
            assert clock.monotonic() < give_up_at
            victim.process.send_signal(signal.SIGCONT)
            await asyncio.sleep(0.01)
            suspend(victim.process.pid)
        frozen_at = clock.now()
        await until(lambda: asyncio.to_thread(victim.process.poll), 15)
        assert victim.process.poll() == -signal.SIGKILL
        other.wait_until_said(f"the process {victim.process.pid} of node ")

        async def fires() -> bool:
            return any(
                run["created_at"] > frozen_at for run in await rows(ledger, state="succeeded")
            )

        await until(fires, 15)


async def test_a_node_of_another_machine_is_left_alone(ledger: Database) -> None:
    """It has no file here, so nothing is known about it."""
    node = new_id()
    async with ledger.engine.begin() as connection:
        now = await now_of(connection)
        row = {
            "id": node,
            "host": "elsewhere",
            "pid": 1,
            "version": "1",
            "draining": False,
            "tasks": [],
        }
        await connection.execute(tables.nodes.insert().values(**row, started_at=now, seen_at=now))
        await rescue(connection, await gone(connection, ledger), now)
    assert (await rows(ledger, tables.nodes))[0]["stopped_at"] is None


async def gone(connection: AsyncConnection, ledger: Database) -> dict[str, int]:
    """The nodes whose files say that their process is dead, with their counters."""
    found = (await ledger_poll.read(connection, new_id())).others
    return {
        node.id: node.beats for node in found if process_lock.is_gone(folder_of(ledger), node.id)
    }


def folder_of(ledger: Database) -> Path:
    return process_lock.folder_of(ledger.url.render_as_string(hide_password=False))


def dead_node(folder: Path) -> str:
    """The id of a node whose process is gone: its file is there, and nobody holds it."""
    node = new_id()
    process_lock.ProcessLock(folder, node)._release()
    assert process_lock.is_gone(folder, node)
    return node
