"""Lists, gauges, Night and the pages of tasks read no parts of runs, however many the newest runs
were split into.

What a statement reads is measured: on PostgreSQL the rows of batch_runs, by EXPLAIN ANALYZE; on
SQLite, which can't tell, the steps of its virtual machine. Each part that is read takes several of
them.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.incidents import durations, made_good
from batch_system.batch.ledger import gauges, json_rows, run_ids, run_query, run_rows, runs
from batch_system.batch.ledger.run_query import Key, RunQuery
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.retention.pruning import Pruner
from batch_system.batch.retention.retention import Keep
from batch_system.config import Settings
from batch_system.database.engine import Database
from batch_system.operations.asking.context import Loaded
from batch_system.operations.night import lanes
from batch_system.operations.night import night as night_reading
from batch_system.operations.night.results import SlotCounts
from batch_system.operations.operations import Operations
from batch_system.operations.system import live
from batch_system.operations.tasks import history, overview
from batch_system.verbs.night import ShowStatus
from tests.batch.ledger_world import know, make_task
from tests.batch.test_plans import Plans
from tests.batch.test_runs import new

SPLIT, PARTS = 3, 2_000
"""So many runs, the newest of all, have so many parts each."""
WITHOUT = 300
"""Runs without parts."""
MOST = {"postgresql": 1_500, "sqlite": 15_000}
"""Rows of batch_runs, or steps, that a statement may take: fewer than the parts, and than three
steps for each part.
"""

STATES = ("succeeded", "failed", "cancelled", "running", "queued")


async def fill(ledger: Database) -> Key:
    """Runs of two tasks, of which one has the newest: those that were split, and their parts.

    Returns the key of one of the first parts, which is near the end of a list of all parts.
    """
    await know(ledger, make_task("plain", "* * * * *"), make_task("split", None))
    now = clock.now()
    ended = {"started_at": now, "attempt_started_at": now, "finished_at": now, "exclusive": None}
    some = [
        new(
            "plain" if n % 2 else "split",
            state="succeeded",
            created_at=now - timedelta(hours=2, minutes=n),
            **ended,
        )
        for n in range(WITHOUT)
    ]
    slots = [
        new("split", origin="schedule", slot=now - timedelta(days=9, hours=n), created_at=now)
        for n in range(20)
    ]
    parents = [
        new("split", state="waiting", gate="parts", exclusive=None, created_at=now)
        for _ in range(SPLIT)
    ]
    ids: list[str] = []
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [*some, *slots, *parents])
        for parent in parents:
            # All but ten parts have ended, because queues and lists of running runs have indexes of
            # their own.
            rows = [
                {
                    **vars(new("split", created_at=now, **ended)),
                    "origin": "part",
                    "part": n,
                    "awaited_by": parent.id,
                }
                | {
                    "state": STATES[n % 3] if n > 10 else STATES[n % 5],
                    "parent": parent.id,
                    "noticed_at": now,
                }
                for n in range(PARTS)
            ]
            await json_rows.insert(connection, runs.runs, rows)
            ids += [str(row["id"]) for row in rows]
    if ledger.kind == "postgresql":
        async with ledger.engine.begin() as connection:
            await connection.execute(text("ANALYZE"))
    return now, ids[len(STATES)]


def lists() -> Iterator[Mapping[str, Any]]:
    now = clock.now()
    few = frozenset({"failed", "cancelled"})
    yield from (
        {},
        {"task": "split"},
        {"states": few},
        {"states": frozenset({"succeeded"})},
        {"text": "x"},
    )
    yield from (
        {"states": frozenset(RunState)},
        {"created_since": now - timedelta(hours=1)},
        {"task": "plain"},
    )
    yield from (
        {"task": "split", "by_slot": True},
        {"origins": frozenset({"manual"}), "states": few},
    )


async def read_lists(connection: AsyncConnection, _: Key) -> None:
    for conditions in lists():
        page = await run_query.page(connection, RunQuery(**conditions), 10)
        if page.after is not None:
            await run_query.page(connection, RunQuery(**conditions), 10, page.after)


async def read_parts(connection: AsyncConnection, key: Key) -> None:
    """Parts are read here, but not more than are shown."""
    for conditions in (
        *(
            {"origins": frozenset({"part"})},
            {"origins": frozenset({"part"}), "states": frozenset({"failed"})},
        ),
        {"origins": frozenset({"part"}), "created_since": clock.now() - timedelta(hours=1)},
    ):
        assert len((await run_query.page(connection, RunQuery(**conditions), 10)).rows) == 10
        last = await run_query.page(connection, RunQuery(**conditions), 10, key)
        assert 0 < len(last.rows) < 10


async def read_gauges(connection: AsyncConnection, _: Key) -> None:
    await gauges.totals(connection)
    await gauges.task_rows(connection)
    await durations.outdated(connection, clock.now() + timedelta(days=1))


async def read_tasks(connection: AsyncConnection, _: Key) -> None:
    now = clock.now()
    await runs.latest(connection, "split")
    await run_rows.newest_of_each(connection, ["split", "plain"], ("id", "state"), 20)
    await durations.UsualDurations(connection, now).of_task("split")
    await made_good.successes_since(connection, "split", now, 10)
    await made_good.successes_around(connection, [("split", "f", now, now)])
    await lanes._runs(connection, ["split"], now - timedelta(hours=1), now)
    failed = SlotCounts(
        **{
            **dict.fromkeys(SlotCounts.model_fields, 0),
            "due": 1,
            "failed": 1,
            "recounted_until": now,
        }
    )
    await night_reading.failed_slots(connection, failed, now - timedelta(hours=1), now)


READERS: dict[str, Callable[[AsyncConnection, Key], Awaitable[None]]] = {
    each.__name__: each for each in (read_lists, read_parts, read_gauges, read_tasks)
}


async def work(ledger: Database, statement: str, parameters: Any) -> int:
    """What the statement reads: rows of batch_runs on PostgreSQL, steps on SQLite."""
    async with ledger.engine.connect() as connection:
        if ledger.kind == "postgresql":
            prefix = "EXPLAIN (ANALYZE, FORMAT JSON) "
            found = (await connection.exec_driver_sql(prefix + statement, parameters)).scalar_one()
            (plan,) = json.loads(found) if isinstance(found, str) else found
            return sum(map(_read, _nodes(plan["Plan"])))
        steps = [0]
        raw = (await connection.get_raw_connection()).driver_connection
        assert raw is not None

        def count() -> int:
            steps[0] += 10
            return 0

        await raw.set_progress_handler(count, 10)
        await connection.exec_driver_sql(statement, parameters)
        await raw.set_progress_handler(None, 0)
        return steps[0]


def _nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from _nodes(below)


def _read(node: Mapping[str, Any]) -> int:
    if node.get("Relation Name") != "batch_runs":
        return 0
    removed = sum(node.get(f"Rows Removed by {why}", 0) for why in ("Filter", "Index Recheck"))
    return round((node["Actual Rows"] + removed) * node["Actual Loops"])


async def too_much(ledger: Database, plans: Plans) -> list[tuple[int, str]]:
    """The statements that take more than MOST."""
    taken = [
        (await work(ledger, statement, parameters), statement)
        for statements in plans.sent.values()
        for statement, (_, parameters) in statements.items()
        if "batch_runs" in statement
    ]
    assert taken
    return [each for each in taken if each[0] > MOST[ledger.kind]]


@pytest.mark.rest
@pytest.mark.parametrize("name", READERS)
async def test_no_parts_are_read(ledger: Database, name: str) -> None:
    key = await fill(ledger)
    plans = Plans(ledger)
    async with ledger.engine.connect() as connection:
        with plans.of(name):
            await READERS[name](connection, key)
    assert await too_much(ledger, plans) == []


async def test_night_and_the_pages_of_tasks_read_no_parts(
    ledger: Database, application: Database
) -> None:
    await fill(ledger)
    plans = Plans(ledger)
    operations = Operations(ledger, application, Loaded, Settings())
    with plans.of("night"):
        await operations(ShowStatus())
        await overview.overview(operations.context, "all", "", 0)
        await history.history(operations.context, "split", "UTC")
        await live.look(operations.context, {"runs", "tasks", "nodes"}, ())
        assert await Pruner(ledger, application, Keep(1, 1), pause=0).count() == {}
    assert await too_much(ledger, plans) == []


async def test_a_scan_would_be_seen(ledger: Database) -> None:
    await fill(ledger)
    statement = "SELECT id FROM batch_runs ORDER BY priority, id LIMIT 1"
    assert await work(ledger, statement, ()) > MOST[ledger.kind]


async def test_many_parts_do_not_hide_runs_from_the_gauges_nor_from_the_search_for_an_id(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most ten thousand of each state are counted: of the runs, and of the parts."""
    at = clock.now() - timedelta(hours=1)
    run, parent = (
        new("t", exclusive=None),
        new("t", state="waiting", gate="parts", created_at=at, exclusive=None),
    )
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [run, parent])
        own = {"origin": "part", "awaited_by": parent.id, "parent": parent.id}
        number = gauges.MOST_COUNTED + 1
        rows = [
            vars(new("t", created_at=at, exclusive="t/parts")) | own | {"part": n}
            for n in range(number)
        ]
        await json_rows.insert(connection, runs.runs, rows)
        monkeypatch.setattr(run_ids, "MOST_SEARCHED", 100)
        totals = await gauges.totals(connection)
        found = [
            [row["id"] for row in await run_ids.end_in(connection, each.replace("-", "")[-12:], 2)]
            for each in (run.id, str(rows[-1]["id"]))
        ]
    assert (totals.runs["queued"], totals.parts["queued"]) == (1, gauges.MOST_COUNTED)
    assert (totals.runs["waiting"], totals.parts["waiting"]) == (1, 0)
    assert found == [[run.id], [rows[-1]["id"]]]


async def test_lists_have_the_parts_that_were_asked_for_and_no_others(ledger: Database) -> None:
    at = clock.now() - timedelta(hours=1)
    parent = new("t", state="waiting", gate="parts", exclusive=None, created_at=at)
    other = new(
        "u", state="failed", exclusive=None, created_at=at + timedelta(minutes=1), finished_at=at
    )
    own = {"origin": "part", "awaited_by": parent.id, "parent": parent.id}
    parts = [
        vars(new("t", created_at=at, exclusive="t/parts", state=state)) | own | {"part": n}
        for n, state in enumerate(("queued", "succeeded", "failed", "failed"), start=1)
    ]
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [parent, other])
        await json_rows.insert(connection, runs.runs, parts)

        async def listed(**conditions: Any) -> list[Any]:
            """The numbers of the parts and the tasks of the runs, in pages of two."""
            found, before = [], None
            while True:
                query = RunQuery(**conditions)
                page = await run_query.page(
                    connection, query, 2, before, columns=("id", "task", "part")
                )
                found += [row["part"] or row["task"] for row in page.rows]
                if (before := page.after) is None:
                    return found

        only, failed = {"origins": frozenset({"part"})}, {"states": frozenset({"failed"})}
        both = {"origins": frozenset({"part", "manual"})}
        assert await listed() == ["u", "t"]
        assert sorted(await listed(**only)) == [1, 2, 3, 4]
        assert (
            await listed(**only) == await listed(parent=parent.id) == await listed(**only, task="t")
        )
        assert await listed(**only, task="u") == await listed(**only, task="t", by_slot=True) == []
        assert sorted(await listed(**only, **failed)) == [3, 4]
        assert await listed(parent=parent.id, **failed) == await listed(**only, **failed)
        assert await listed(parent=new_id()) == await listed(parent=parent.id, by_slot=True) == []
        every = await listed(**both)
        assert (every[0], sorted(map(str, every[1:]))) == ("u", ["1", "2", "3", "4", "t"])
        assert sorted(map(str, await listed(**both, **failed))) == ["3", "4", "u"]
        assert sorted(map(str, await listed(**both, task="t"))) == ["1", "2", "3", "4", "t"]
