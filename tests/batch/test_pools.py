"""Claims by pool: whose runs a node finds, and what the runs of other pools cost it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text, update

from batch_system import clock, config
from batch_system.batch.account.account import tasks_of_running_nodes
from batch_system.batch.incidents import noticing, outages
from batch_system.batch.ledger import nodes, tables
from batch_system.batch.ledger.incidents import tables as incident_tables
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.nodes import ledger_poll, new_tasks
from batch_system.batch.nodes.node import Node
from batch_system.batch.nodes.orphans import rescue
from batch_system.batch.nodes.roles import BY_HAND, SERVICE, Roles
from batch_system.batch.queue import claiming
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.tasks.registry import Task, TaskRegistry
from batch_system.config import get_settings
from batch_system.database.engine import Database
from batch_system.server.lifecycle import sign_on
from batch_system.server.service import BatchService
from batch_system.server.worker import warn_of_services
from tests.batch.crowd import words
from tests.batch.ledger_world import NODE, know, make_task, refresh, rows, schedule_sync_of, until
from tests.batch.test_leases import put_node, put_run
from tests.batch.test_runs import NOW, insert, new

OTHERS = 100_000
TOLD = {
    "description": "",
    "source": "tasks/dropped.py",
    "policies": {},
    "first_seen_at": NOW,
    "last_seen_at": NOW,
}
GPU = Roles(fires=False, pools=frozenset({"gpu"}))


def capacity_of(*pools: str) -> Capacity:
    return Capacity(10, 10, dict.fromkeys(pools))


async def take(
    ledger: Database, tasks: dict[str, Task], *pools: str, node: str = NODE
) -> list[Claimed]:
    async with ledger.engine.begin() as connection:
        return (await claiming.take(connection, tasks, node, capacity_of(*pools)))[0]


async def is_claimable(ledger: Database, roles: Roles) -> bool:
    async with ledger.reader.connect() as connection:
        return (await ledger_poll.read(connection, NODE, roles)).is_claimable


async def test_a_node_finds_and_claims_only_the_runs_of_its_pools(ledger: Database) -> None:
    loaded = await know(ledger, make_task("usual", None), make_task("heavy", None, pool="gpu"))
    await insert(ledger, new("heavy"))
    assert (await is_claimable(ledger, SERVICE), await is_claimable(ledger, GPU)) == (False, True)
    assert await take(ledger, loaded, "default") == []
    await insert(ledger, new("usual"))
    assert await is_claimable(ledger, SERVICE)
    assert [run.task for run in await take(ledger, loaded, "default")] == ["usual"]
    assert [run.task for run in await take(ledger, loaded, "cpu", "gpu")] == ["heavy"]


async def test_retries_of_another_pool_are_left_to_it(ledger: Database) -> None:
    loaded = await know(ledger, make_task("usual", None), make_task("heavy", None, pool="gpu"))
    await insert(ledger, new("heavy", state="retrying", attempt=1))
    assert (await is_claimable(ledger, SERVICE), await is_claimable(ledger, GPU)) == (False, True)
    assert await take(ledger, loaded, "default") == []
    assert [run.task for run in await take(ledger, loaded, "gpu")] == ["heavy"]


async def test_a_changed_pool_moves_what_is_queued_and_nothing_that_runs(ledger: Database) -> None:
    before = await know(ledger, make_task("moved", None, pool="gpu", overlap="allow"))
    first, second = new("moved", exclusive=None), new("moved", exclusive=None)
    await insert(ledger, first)
    assert [run.id for run in await take(ledger, before, "gpu", node=new_id())] == [first.id]
    (held,) = await rows(ledger, id=first.id)
    await insert(ledger, second)
    TaskRegistry.clear()
    after = await know(ledger, make_task("moved", None, overlap="allow"))
    assert (await is_claimable(ledger, SERVICE), await is_claimable(ledger, GPU)) == (True, False)
    assert await take(ledger, before, "gpu") == []
    assert [run.id for run in await take(ledger, after, "default")] == [second.id]
    assert await rows(ledger, id=first.id) == [held]


async def test_only_a_node_whose_code_has_the_pool_of_the_ledger_claims_a_run(
    ledger: Database,
) -> None:
    """While a deployment moves a task, older processes leave its runs to the newer ones."""
    older = {"moved": make_task("moved", None)}
    TaskRegistry.clear()
    newer = await know(ledger, make_task("moved", None, pool="gpu"))
    await insert(ledger, new("moved"))
    assert await take(ledger, older, "default") == await take(ledger, older, "gpu") == []
    assert len(await take(ledger, newer, "gpu")) == 1


async def test_a_process_by_hand_with_other_code_changes_nothing_of_the_tasks_that_a_service_has(
    ledger: Database, ledger_url: str
) -> None:
    """Otherwise no node would claim the runs of a task that is in another pool in that code, until
    a service starts.
    """
    loaded = await know(ledger, make_task("theirs", None))
    await put_node(ledger, fires=True)
    await insert(ledger, new("theirs"))
    TaskRegistry.clear()
    other = {
        task.name: task
        for task in (make_task("theirs", None, pool="gpu"), make_task("fresh", None))
    }
    node = Node(ledger_url, 5, 30, roles=BY_HAND)
    await sign_on(ledger, node, other, [], get_settings(), None)
    await node.unlock()
    assert [run.task for run in await take(ledger, loaded, "default")] == ["theirs"]
    assert [row["name"] for row in await rows(ledger, tables.tasks)] == ["fresh", "theirs"]


async def test_the_service_that_started_last_takes_a_task_back_into_the_pool_of_its_code(
    ledger: Database,
) -> None:
    """A process with older code that has started after it, and has ended, had moved the task."""
    newer = {"theirs": make_task("theirs", None)}
    node = await put_node(ledger, fires=True)
    last = await put_node(ledger, fires=True)
    TaskRegistry.clear()
    await know(ledger, make_task("theirs", None, pool="gpu"))
    await insert(ledger, new("theirs"))
    sync = schedule_sync_of(ledger, newer, node)
    await refresh(sync)
    assert await take(ledger, newer, "default") == []
    async with ledger.engine.begin() as connection:
        await connection.execute(
            update(tables.nodes).where(tables.nodes.c.id == last).values(stopped_at=clock.now())
        )
    await refresh(sync)
    assert [run.task for run in await take(ledger, newer, "default")] == ["theirs"]


async def test_two_services_that_start_at_once_after_an_outage_both_know_of_it(
    ledger: Database,
) -> None:
    now = clock.now()
    stopped = now - timedelta(minutes=10)
    await put_node(ledger, started_at=stopped - timedelta(hours=1), stopped_at=stopped)
    first = await put_node(ledger, started_at=now - timedelta(seconds=2))
    second = await put_node(ledger, started_at=now)
    async with ledger.engine.connect() as connection:
        for node in (first, second):
            assert await outages.before_node(connection, node) == (
                stopped,
                now - timedelta(seconds=2),
            )


# A worker is no service.


async def test_a_living_worker_does_not_hide_that_no_service_lived(ledger: Database) -> None:
    stopped = clock.now() - timedelta(minutes=10)
    await put_node(ledger, started_at=stopped - timedelta(hours=1), stopped_at=stopped)
    await put_node(ledger, fires=False, pools=["gpu"])
    service = await put_node(ledger)
    async with ledger.engine.connect() as connection:
        outage = await outages.before_node(connection, service)
        assert outage is not None and outage[0] == stopped
        assert await nodes.live_tasks(connection) == {"theirs"}
        await connection.execute(
            update(tables.nodes).where(tables.nodes.c.fires).values(stopped_at=clock.now())
        )
        assert (
            await nodes.live_tasks(connection)
            == await tasks_of_running_nodes(connection, stopped)
            == set()
        )


async def test_a_lost_worker_is_an_incident_if_nobody_continues_its_runs(
    ledger: Database,
) -> None:
    await know(ledger, make_task("theirs", None, pool="gpu"))
    worker = await put_node(ledger, fires=False, pools=["gpu"])
    run = await put_run(ledger, worker)
    async with ledger.engine.begin() as connection:
        assert await rescue(connection, {worker: 0}, clock.now()) == [worker]
        assert await noticing.notice_nodes(connection, clock.now(), timedelta(0)) == 1
    assert [row["id"] for row in await rows(ledger, state="interrupted")] == [run]
    (incident,) = await rows(ledger, incident_tables.incidents)
    assert (incident["kind"], "elsewhere" in incident["text"], "theirs" in incident["text"]) == (
        "node",
        True,
        True,
    )


async def test_the_files_that_a_worker_cannot_use_are_an_incident_until_they_are_corrected(
    ledger: Database,
) -> None:
    worker = await put_node(ledger, fires=False, pools=["gpu"])
    for broken, is_closed in (
        ([{"source": "tasks/a.py", "error": "SyntaxError", "task": None}], False),
        ([], True),
    ):
        async with ledger.engine.begin() as connection:
            await nodes.record_broken(connection, worker, broken)
            assert await noticing.notice_nodes(connection, clock.now(), timedelta(0)) == 1
        (incident,) = await rows(ledger, incident_tables.incidents)
        assert (incident["kind"], incident["closed_at"] is not None) == ("files", is_closed)


@pytest.fixture
async def worker(
    ledger: Database, ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[BatchService]:
    for name, value in {
        "LEDGER_URL": ledger_url,
        "DRAIN_SECONDS": "0",
        "POLL_SECONDS": "0.05",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(new_tasks, "LOOK_SECONDS", 0.02)
    config.forget_settings()
    service = BatchService(get_settings(), GPU)
    await service.start()
    yield service
    await service.stop()


DROPPED = """
from batch_system import BaseTask

class Dropped(BaseTask):
    name, schedule, pool = "dropped", None, "gpu"

    async def run(self) -> str:
        return "here"
"""


async def test_a_worker_loads_new_files_and_records_in_the_ledger_which_it_cannot_use(
    worker: BatchService, ledger: Database
) -> None:
    added: list[int] = []
    worker.new_tasks.on_added.append(lambda: added.append(len(worker.tasks)))
    await insert(ledger, new("dropped"))
    async with ledger.engine.begin() as connection:
        await connection.execute(tables.tasks.insert(), {**TOLD, "name": "dropped", "pool": "gpu"})
    Path("tasks/dropped.py").write_text(DROPPED)
    (run,) = await until(lambda: rows(ledger, state="succeeded"))
    assert (run["result"], run["node"], added) == ("here", worker.node.id, [1])
    Path("tasks/broken.py").write_text("1 / 0")

    async def broken() -> Any:
        (node,) = await rows(ledger, tables.nodes, id=worker.node.id)
        assert node["tasks"] == ["dropped"]
        return node["broken"]

    assert [file["source"] for file in await until(broken)] == ["tasks/broken.py"]
    assert [row["name"] for row in await rows(ledger, tables.tasks)] == ["dropped"]
    assert await rows(ledger, tables.schedules) == []


async def test_a_worker_warns_if_a_service_of_another_machine_uses_its_sqlite_file(
    worker: BatchService,
    ledger: Database,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("batch_system.server.worker.LOOK_SECONDS", 0.02)
    await warn_of_services(worker)
    assert "no service is running: until one is, nothing fires" in capsys.readouterr().err
    await put_node(ledger)

    async def said_later() -> str:
        return capsys.readouterr().err

    assert await until(said_later) == "  a service is running now, on the host elsewhere\n"
    await warn_of_services(worker)
    said = capsys.readouterr().err
    assert (
        ("a service on the host elsewhere uses it" in said)
        == (ledger.kind == "sqlite")
        == bool(said)
    )


# What the runs of other pools cost.


class Cost:
    """How much the database does for the statements of a node: rows on PostgreSQL, steps of its
    machine on SQLite.
    """

    def __init__(self, ledger: Database) -> None:
        self._ledger = ledger
        self.sent: list[tuple[str, Any]] = []
        self.keeps = False
        for engine in {ledger.engine.sync_engine, ledger.reader.sync_engine}:
            event.listen(engine, "before_cursor_execute", self._keep)

    def _keep(self, _: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        if self.keeps:
            self.sent.append((statement, parameters))

    async def of_a_node(self, loaded: dict[str, Task], roles: Roles) -> int:
        self.sent, self.keeps = [], True
        await is_claimable(self._ledger, roles)
        async with self._ledger.reader.connect() as connection:
            await claiming.startable(connection, loaded, capacity_of(*roles.pools), locks=False)
        self.keeps = False
        assert len(self.sent) >= 2
        return sum(
            [
                await self.measured(*sent)
                for sent in self.sent
                if sent[0].startswith(("SELECT", "WITH"))
            ]
        )

    async def measured(self, statement: str, parameters: Any) -> int:
        if self._ledger.kind == "sqlite":
            return _steps(str(self._ledger.url.database), statement, parameters)
        async with self._ledger.engine.connect() as connection:
            prefix = "EXPLAIN (ANALYZE, FORMAT JSON) "
            found = (await connection.exec_driver_sql(prefix + statement, parameters)).scalar_one()
        (plan,) = json.loads(found) if isinstance(found, str) else found
        return _read_rows(plan["Plan"])


def _steps(file: str, statement: str, parameters: Any) -> int:
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 10
        return 0

    with closing(sqlite3.connect(file)) as connection:
        connection.set_progress_handler(count, 10)
        connection.execute(statement, parameters).fetchall()
    return steps


def _read_rows(plan: dict[str, Any]) -> int:
    own = plan.get("Actual Rows", 0) + plan.get("Rows Removed by Filter", 0)
    return int(own * plan["Actual Loops"]) + sum(_read_rows(each) for each in plan.get("Plans", ()))


async def fill(ledger: Database, task: str, state: str, number: int = OTHERS) -> None:
    by = words(ledger)
    columns = (
        "(id, task, origin, state, rank, catch_up, exclusive, due_at, attempt, fence, created_at)"
    )
    at = by["at"].format("-1 day")
    values = f"{by['id']}, '{task}', 'manual', '{state}', 2, false, NULL, {at}, 0, 0, {at}"
    async with ledger.engine.begin() as connection:
        await connection.execute(
            text(f"{by['series']} INSERT INTO batch_runs {columns} SELECT {values} {by['from']}")
            if ledger.kind == "postgresql"
            else text(
                f"INSERT INTO batch_runs {columns} {by['series']} SELECT {values} {by['from']}"
            ),
            {"count": number},
        )
        if ledger.kind == "postgresql":
            await connection.execute(text("ANALYZE batch_runs"))


@pytest.mark.rest
@pytest.mark.parametrize("state", ["queued", "retrying"])
async def test_a_hundred_thousand_runs_of_another_pool_cost_a_node_nothing(
    ledger: Database, state: str
) -> None:
    loaded = await know(ledger, make_task("usual", None), make_task("heavy", None, pool="gpu"))
    await insert(ledger, *(new("usual", state=state, due_at=clock.now()) for _ in range(20)))
    await insert(ledger, new("heavy", state=state))
    cost = Cost(ledger)
    before = [
        await cost.of_a_node(loaded, roles) for roles in (SERVICE, Roles(False, SERVICE.pools))
    ]
    await fill(ledger, "heavy", state)
    after = [
        await cost.of_a_node(loaded, roles) for roles in (SERVICE, Roles(False, SERVICE.pools))
    ]
    assert await cost.measured("SELECT count(due_at) FROM batch_runs", ()) > OTHERS
    assert all(now <= 1.2 * then + 50 for then, now in zip(before, after, strict=True)), (
        before,
        after,
    )
