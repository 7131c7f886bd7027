"""Partitioned tasks in real processes: parts in children and on workers, and `batch run` without
any service.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from batch_system.database.engine import Database
from tests.batch.ledger_world import rows, until
from tests.databases import application_with_done, items_done
from tests.incidents.receivers import http_receiver
from tests.processes import BATCH, Service, batch, process, service

SETTINGS = {
    "POLL_SECONDS": "0.1",
    "DRAIN_SECONDS": "5",
    "HEARTBEAT_SECONDS": "0.3",
    "LEASE_SECONDS": "2",
}

TASKS = """
import asyncio, os
from batch_system import Done, Part, PartitionedTask, current_run
from sqlalchemy import text

class Load(PartitionedTask):
    name, schedule, pool, parallel = "load", None, "POOL", 3
    async def split(self, parts: int = 6) -> list[Part]:
        return [Part(first=10 * n, last=10 * n + 10) for n in range(parts)]
    async def work(self, part: Part) -> int:
        async for chunk in self.chunks(range(part["first"], part["last"]), size=5):
            async with chunk as (db, items):
                for item in items:
                    await db.execute(text("INSERT INTO done (item) VALUES (:item)"), {"item": item})
            await asyncio.sleep(0.02)
        return os.getpid()
    async def join(self, parts: list[Done]) -> dict:
        pids = {done.result for done in parts}
        return {"parts": len(parts), "pids": len(pids), "first": parts[0].params["first"]}

class Halves(PartitionedTask):
    name, schedule, ping = "halves", None, "PING"
    async def split(self) -> list[Part]:
        return [Part(half=1), Part(half=2)]
    async def work(self, part: Part) -> None:
        if part["half"] == 2 and current_run().attempt == 1:
            raise ValueError("the second half fails once")

class Stuck(PartitionedTask):
    name, schedule, pool, parallel = "stuck", None, "POOL", 2
    async def split(self) -> list[Part]:
        return [Part() for _ in range(5)]
    async def work(self, part: Part) -> None:
        await asyncio.sleep(60)
"""


class Place:
    """A folder with the tasks, whose pool is `pool`, and two databases."""

    def __init__(self, folder: Path, ledger: Database, application: str, stack: ExitStack) -> None:
        self.folder, self.ledger, self._stack = folder, ledger, stack
        url = ledger.url.render_as_string(hide_password=False)
        self.settings = {**SETTINGS, "LEDGER_URL": url, "DATABASE_URL": application}

    def have(self, pool: str, ping: str = "http://127.0.0.1:1") -> None:
        (self.folder / "tasks").mkdir(parents=True)
        (self.folder / "tasks/all.py").write_text(TASKS.replace("POOL", pool).replace("PING", ping))

    def serve(self, **settings: str) -> Service:
        return self._stack.enter_context(
            service(self.folder, settings={**self.settings, **settings})
        )

    def work(self, **settings: str) -> Service:
        command = (*BATCH, "work", "--pool", "cpu")
        return self._stack.enter_context(
            process(self.folder, command, {**self.settings, **settings})
        )

    def batch(self, *words: str) -> str:
        done = batch(self.folder, *words, settings=self.settings)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def queue(self, task: str) -> str:
        return str(json.loads(self.batch("run", task, "--queue", "--json"))["id"])

    async def state(self, run: str, *states: str) -> dict[str, Any]:
        async def reached() -> dict[str, Any] | None:
            (row,) = await rows(self.ledger, id=run)
            return row if row["state"] in states else None

        return dict(await until(reached))

    async def done(self) -> list[int]:
        return await items_done(self.settings["DATABASE_URL"])


@pytest.fixture
async def place(ledger: Database, tmp_path: Path) -> Any:
    application = await application_with_done(ledger, tmp_path)
    with ExitStack() as stack:
        yield Place(tmp_path / "place", ledger, application, stack)


ENDED = ("succeeded", "failed", "cancelled")


async def test_parts_run_in_children_and_join_gets_their_results(place: Place) -> None:
    place.have("cpu")
    place.serve(BATCH_POOL_CPU="process:2")
    row = await place.state(place.queue("load"), *ENDED)
    assert (row["state"], row["reason"]) == ("succeeded", None)
    assert row["result"] == {"parts": 6, "pids": 6, "first": 0}
    assert sorted(await place.done()) == list(range(60))


async def test_parts_run_on_workers_and_go_on_when_one_is_killed(place: Place) -> None:
    place.have("cpu")
    place.serve(BATCH_POOL_CPU="nodes")
    worker, _ = place.work(BATCH_POOL_CPU="nodes"), place.work(BATCH_POOL_CPU="nodes")
    run = place.queue("load")
    await until(place.done)
    os.kill(worker.process.pid, signal.SIGKILL)
    row = await place.state(run, *ENDED)
    assert (row["state"], row["result"]["parts"]) == ("succeeded", 6)
    assert sorted(await place.done()) == list(range(60))


async def test_batch_run_does_the_parts_in_its_own_process(place: Place) -> None:
    place.have("default")
    place.batch("run", "load")
    (row,) = await rows(place.ledger, task="load", origin="manual")
    assert (row["state"], row["result"]["pids"]) == ("succeeded", 1)
    shown = place.batch("show", row["id"])
    assert "Parts (6: 6 succeeded)" in shown
    listed = json.loads(place.batch("runs", "--parent", row["id"], "--json"))
    assert [part["origin"] for part in listed] == ["part"] * 6
    assert len(json.loads(place.batch("runs", "--json"))) == 1


async def test_a_cancel_stops_the_parts_that_are_running(place: Place) -> None:
    place.have("default")
    place.serve()
    run = place.queue("stuck")

    async def are_running() -> bool:
        return len(await rows(place.ledger, awaited_by=run, state="running")) == 2

    await until(are_running)
    (listed,) = json.loads(place.batch("runs", "--state", "waiting", "--json"))
    assert listed["awaits"][0] | {"kind": "parts", "active": 5, "members": 5} == listed["awaits"][0]
    assert "5 parts, 0 done" in place.batch("runs")
    assert "for 5 of its 5 parts" in place.batch("show", run)
    place.batch("cancel", run)

    async def are_over() -> bool:
        return len(await rows(place.ledger, awaited_by=run, state="cancelled")) == 5

    await until(are_over)
    assert (await place.state(run, "cancelled"))["reason"].startswith("cancelled by")


async def test_a_run_that_fails_by_its_parts_is_told_once_by_the_service_that_closes_it(
    place: Place,
) -> None:
    async with http_receiver() as receiver:
        place.have("default", ping=receiver.url)
        services = [place.serve(), place.serve()]
        run = place.queue("halves")
        await place.state(run, "failed")
        await until(lambda: asyncio.sleep(0, len(receiver.requests) >= 2))
        place.batch("retry", run)
        await place.state(run, "succeeded")
        await until(lambda: asyncio.sleep(0, len(receiver.requests) >= 3))
    assert [request.path for request in receiver.requests] == ["/hook/start", "/hook/fail", "/hook"]
    said = "".join(service.stdout + service.stderr for service in services)
    assert said.count("halves failed: 1 of 2 parts failed: 2") == 1
