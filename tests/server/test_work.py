"""`batch work` as a process of its own, beside a real service, on both databases."""

from __future__ import annotations

import os
import signal
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from batch_system.batch.ledger import tables
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.wakes import CATALOG
from batch_system.database.engine import Database
from tests.batch.ledger_world import rows, until
from tests.batch.test_runs import NOW, insert, new
from tests.databases import application_with_done, items_done, migrated, url_of
from tests.migrations import APPLICATION_HISTORIES
from tests.processes import BATCH, Service, batch, process, service

SETTINGS = {"POLL_SECONDS": "0.1", "DRAIN_SECONDS": "5", "LOG_LEVEL": "WARNING"}
SHORT_LEASE = {"HEARTBEAT_SECONDS": "0.2", "LEASE_SECONDS": "1.2"}

TASKS = """
import asyncio
import os
from batch_system import BaseTask, current_run
from sqlalchemy import text

class Usual(BaseTask):
    name, schedule = "usual", {schedule!r}
    async def run(self) -> int:
        return os.getpid()

class Heavy(BaseTask):
    name, schedule, pool, overlap = "heavy", {schedule!r}, "cpu", "allow"
    async def run(self) -> int:
        with open(os.environ["WITNESS"], "a") as file:
            file.write(f"{{current_run().id}}\\n")
        return os.getpid()

class Long(BaseTask):
    name, schedule, pool = "long", None, "cpu"
    async def run(self) -> int:
        async for chunk in self.chunks(range(40), size=1):
            async with chunk as (db, items):
                statement = text("INSERT INTO done (item) VALUES (:item)")
                await db.execute(statement, {{"item": items[0]}})
            while items[0] >= 20 and os.path.exists(os.environ["WITNESS"] + ".hold"):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.04)
        return os.getpid()

class Stubborn(BaseTask):
    name, schedule, pool = "stubborn", None, "cpu"
    async def run(self) -> None:
        await asyncio.sleep(600)
"""
NEVER = "0 0 1 1 *"
EACH_SECOND = "* * * * * *"


class Place:
    """Folders of a service and of workers, which share two databases and nothing else."""

    def __init__(self, folder: Path, ledger: Database, application: str, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self.ledger = ledger
        self.witness = folder / "witness"
        self._held = folder / "witness.hold"
        folder.mkdir()
        url = ledger.url.render_as_string(hide_password=False)
        self.settings = {
            **SETTINGS,
            "LEDGER_URL": url,
            "DATABASE_URL": application,
            "WITNESS": str(self.witness),
        }

    def folder(self, name: str, schedule: str = NEVER) -> Path:
        """The folder of a process, with its own files of tasks."""
        folder = self._folder / name
        (folder / "tasks").mkdir(parents=True, exist_ok=True)
        (folder / "tasks/all.py").write_text(TASKS.format(schedule=schedule))
        return folder

    def serve(self, schedule: str = NEVER, **settings: str) -> Service:
        folder = self.folder("service", schedule)
        return self._stack.enter_context(service(folder, settings={**self.settings, **settings}))

    def work(
        self, *words: str, name: str = "worker", pool: str = "cpu", **settings: str
    ) -> Service:
        """A worker that has begun."""
        command = (*BATCH, "work", "--pool", pool, *words)
        folder = self.folder(name)
        worker = self._stack.enter_context(process(folder, command, {**self.settings, **settings}))
        worker._wait_until(lambda: "of other pools" in worker.stdout, "has not begun")
        return worker

    async def node(self, worker: Service) -> dict[str, Any]:
        (row,) = await rows(self.ledger, tables.nodes, pid=worker.process.pid)
        return row

    async def run_of(self, task: str, state: str, node: str | None = None) -> dict[str, Any]:
        """Wait for a run of this task that is in this state, on this node."""
        equal = {"task": task, "state": state} | ({"node": node} if node is not None else {})
        found = await until(lambda: rows(self.ledger, **equal))
        return dict(found[0])

    def hold(self) -> None:
        """Let runs of the task `long` go no further than their middle, however long a test has to
        wait.
        """
        self._held.touch()

    def go_on(self) -> None:
        self._held.unlink()

    async def done(self) -> list[int]:
        """The items that runs of the task `long` have committed. The table refuses an item that is
        there already.
        """
        return await items_done(self.settings["DATABASE_URL"])


@pytest.fixture
async def place(ledger: Database, tmp_path: Path) -> Any:
    application = await application_with_done(ledger, tmp_path)
    seen = {"first_seen_at": NOW, "last_seen_at": NOW}
    pools = {"usual": "default", "heavy": "cpu", "long": "cpu", "stubborn": "cpu"}
    async with ledger.engine.begin() as connection:
        about = [
            {"name": name, "pool": pool, "source": "tasks/all.py", **seen}
            for name, pool in pools.items()
        ]
        await connection.execute(
            tables.tasks.insert(), [{"policies": {}, "description": "", **row} for row in about]
        )
    with ExitStack() as stack:
        yield Place(tmp_path / "places", ledger, application, stack)


async def test_a_service_fires_and_a_worker_executes_the_runs_of_its_pool(place: Place) -> None:
    served, worker = place.serve(EACH_SECOND), place.work("--max-running", "7")
    assert worker.stdout.splitlines()[0] == "Worker of the pool cpu"
    assert worker.stdout.splitlines()[3:] == [
        "  3 tasks: heavy, long, stubborn",
        "  1 task of other pools",
    ]
    own = await place.node(worker)
    assert (own["fires"], own["pools"], own["capacity"]) == (False, ["cpu"], 7)
    assert own["tasks"] == ["heavy", "long", "stubborn", "usual"]

    async def executed() -> list[Any]:
        ended = await rows(place.ledger, state="succeeded")
        return ended if {run["task"] for run in ended} == {"heavy", "usual"} else []

    where = {run["task"]: run["result"] for run in await until(executed)}
    assert where == {"heavy": worker.process.pid, "usual": served.process.pid}
    for ended in (worker, served):
        ended.stop()
        assert ended.process.returncode == -signal.SIGTERM
    assert (await place.node(worker))["stopped_at"] is not None
    assert await rows(place.ledger, tables.missed) == []


@pytest.mark.rest
async def test_a_draining_worker_leaves_its_run_to_another_one(place: Place) -> None:
    first = place.work()
    await insert(place.ledger, new("long"))
    await place.run_of("long", "running", (await place.node(first))["id"])
    await until(place.done)
    first.stop(within=4)
    assert (await place.run_of("long", "interrupted"))["reason"] == "the service stops"
    second = place.work(name="second")
    run = await place.run_of("long", "succeeded")
    assert (run["result"], run["attempt"], await place.done()) == (
        second.process.pid,
        1,
        list(range(40)),
    )


@pytest.mark.rest
async def test_the_run_of_a_killed_worker_is_rescued_by_a_service_and_resumed_by_another_worker(
    place: Place,
) -> None:
    place.serve()
    first = place.work()
    place.hold()
    await insert(place.ledger, new("long"))
    node = (await place.node(first))["id"]
    await place.run_of("long", "running", node)
    await until(place.done)
    second = place.work(name="second")
    first.process.kill()
    place.go_on()
    run = await place.run_of("long", "succeeded")
    assert (run["result"], run["fence"], await place.done()) == (
        second.process.pid,
        2,
        list(range(40)),
    )
    (lost,) = await rows(place.ledger, tables.nodes, id=node)
    assert lost["lost_at"] is not None


@pytest.mark.rest
async def test_only_a_service_rescues_the_runs_of_a_dead_worker(place: Place) -> None:
    first = place.work()
    await insert(place.ledger, new("stubborn"))
    node = (await place.node(first))["id"]
    await place.run_of("stubborn", "running", node)
    second = place.work(name="second")
    first.process.kill()
    first.process.wait()
    await insert(place.ledger, new("long"))
    # After two seconds: a service has looked at all nodes by then.
    await place.run_of("long", "succeeded")
    await place.run_of("stubborn", "running", node)
    place.serve()
    await place.run_of("stubborn", "running", (await place.node(second))["id"])


@pytest.mark.rest
async def test_a_frozen_worker_loses_its_run_and_works_again_when_it_wakes(place: Place) -> None:
    place.serve(**SHORT_LEASE)
    first = place.work(**SHORT_LEASE)
    place.hold()
    await insert(place.ledger, new("long"))
    node = (await place.node(first))["id"]
    await place.run_of("long", "running", node)
    await until(place.done)
    second = place.work(name="second", **SHORT_LEASE)
    first.freeze(place.settings["LEDGER_URL"], place.settings["DATABASE_URL"])
    await place.run_of("long", "running", (await place.node(second))["id"])
    first.process.send_signal(signal.SIGCONT)
    place.go_on()
    run = await place.run_of("long", "succeeded")
    assert (run["result"], await place.done()) == (second.process.pid, list(range(40)))
    second.stop()

    async def is_back() -> bool:
        return (await place.node(first))["stopped_at"] is None

    await until(is_back)
    await insert(place.ledger, new("heavy"))
    assert (await place.run_of("heavy", "succeeded"))["result"] == first.process.pid


@pytest.mark.rest
async def test_two_workers_execute_each_run_once(place: Place) -> None:
    workers = [place.work("--max-running", "3", name=name) for name in ("one", "two")]
    queued = [new("heavy", exclusive=None) for _ in range(200)]
    await insert(place.ledger, *queued)

    async def all_ended() -> list[Any]:
        ended = await rows(place.ledger, task="heavy", state="succeeded")
        return ended if len(ended) == len(queued) else []

    ended = await until(all_ended)
    executed = Counter(place.witness.read_text().split())
    assert set(executed.values()) == {1} and executed.keys() == {run.id for run in queued}
    assert {run["result"] for run in ended} == {worker.process.pid for worker in workers}


@pytest.mark.rest
async def test_a_worker_with_other_files_changes_no_task_of_the_services(place: Place) -> None:
    place.serve()

    async def known() -> list[list[dict[str, Any]]]:
        """Tasks, schedules, and the number that rises when one of them changes."""
        of_both = [await rows(place.ledger, table) for table in (tables.tasks, tables.schedules)]
        return [*of_both, await rows(place.ledger, tables.catalog, id=CATALOG)]

    before = await known()
    older = place.folder("worker", EACH_SECOND)
    other = TASKS.format(schedule=EACH_SECOND).replace('"long", None', '"gone", None')
    (older / "tasks/all.py").write_text(other)
    command = (*BATCH, "work", "--pool", "cpu")
    with process(older, command, place.settings) as worker:
        worker._wait_until(lambda: "of other pools" in worker.stdout, "has not begun")
        await insert(place.ledger, new("heavy"))
        await place.run_of("heavy", "succeeded")
        assert "gone" in (await place.node(worker))["tasks"]
    assert await known() == before


async def test_a_second_ctrl_c_ends_a_worker_at_once_and_its_run_is_interrupted(
    place: Place,
) -> None:
    worker = place.work(DRAIN_SECONDS="60")
    await insert(place.ledger, new("stubborn"))
    await place.run_of("stubborn", "running")
    worker.process.send_signal(signal.SIGINT)

    async def drains() -> bool:
        return bool((await place.node(worker))["draining"])

    await until(drains)
    worker.stop(signal.SIGINT)
    assert (await place.run_of("stubborn", "interrupted"))["reason"] == "the service stopped"


@pytest.mark.rest
async def test_a_worker_opens_no_port_unless_it_is_told_to(place: Place) -> None:
    assert listening(place.work().process.pid) == 0
    worker = place.work("--port", "0", name="second")
    worker.wait_until_ready()
    assert listening(worker.process.pid) == 1
    assert worker.stdout.splitlines()[0] == f"Worker of the pool cpu on {worker.url}"
    for path in ("/healthz", "/readyz", "/metrics"):
        assert worker.get(path).status_code == 200, path
    for path in (
        "/",
        "/signin",
        "/scheduler/jobs",
        "/api/v1/tasks",
        "/api/openapi.json",
        "/docs",
        "/openapi.json",
    ):
        assert worker.get(path).status_code == 404, path
    forged = httpx.get(f"{worker.url}/metrics", headers={"Host": "evil.example"}, trust_env=False)
    assert forged.status_code == 401
    assert "batch_running 0" in worker.get("/metrics").text
    worker.stop(signal.SIGINT)
    assert worker.process.returncode == 0


def listening(pid: int) -> int:
    """The number of TCP sockets on which a process listens."""
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was closed just now
            links.append(os.readlink(link))
    open_sockets = {
        link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:[")
    }
    lines = [
        line.split()
        for kind in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]
    ]
    return sum(fields[3] == "0A" and fields[9] in open_sockets for fields in lines)


async def test_a_worker_without_a_task_of_its_pool_starts_and_says_which_pools_its_tasks_have(
    place: Place,
) -> None:
    worker = place.work(pool="gpu")
    worker.wait_until_said(
        "this worker has no task of the pool gpu: its tasks are of the pools cpu, default"
    )
    worker.wait_until_said("no service is running: until one is, nothing fires")
    assert worker.stdout.splitlines()[3:] == ["  0 tasks", "  4 tasks of other pools"]


@pytest.mark.rest
async def test_a_worker_neither_makes_nor_migrates_a_database(
    database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "tasks/all.py").write_text(TASKS.format(schedule=NEVER))
    application = url_of(tmp_path / "data.db")
    settings = {"LEDGER_URL": database_url, "DATABASE_URL": application}

    def refused() -> str:
        done = batch(tmp_path, "work", "--pool", "cpu", settings=settings)
        assert (done.returncode, done.stdout) == (3, "")
        return done.stderr

    assert (
        "there is no ledger yet" in (said := refused())
        and "LEDGER_URL" in said
        and "start the service first" in said
    )
    assert ("A file of SQLite" in said) == database_url.startswith("sqlite")
    await migrated(database_url, LEDGER_HISTORY)
    assert "there is no application database yet" in (said := refused()) and "DATABASE_URL" in said
    assert not (tmp_path / "data.db").exists()
    await migrated(application, *APPLICATION_HISTORIES)
    with process(tmp_path, (*BATCH, "work", "--pool", "cpu"), settings) as worker:
        worker._wait_until(lambda: "of other pools" in worker.stdout, "has not begun")
