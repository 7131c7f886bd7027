"""Two nodes, and people, at the same moment: a waiting run is opened or closed exactly once, and by
what is true.

Each node has connections of its own. The order of what they do is driven by events. SQLite has one
writer: where PostgreSQL runs two transactions side by side, the second one waits there until the
first is committed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Connection, event, text, update
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import Start, clock, start, start_all
from batch_system.batch.execution.engine import LocalEngine
from batch_system.batch.firing.waiting import Opener, open_and_close
from batch_system.batch.ledger import runs, tables, transitions
from batch_system.batch.ledger import waits as waits_module
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.states import RunState
from batch_system.batch.queue import enqueue, gates
from batch_system.batch.queue.cancel import request_cancel
from batch_system.batch.queue.retry import retry
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from batch_system.errors import LeaseLost
from tests.batch.ledger_world import NODE, make_task, rows, until
from tests.batch.test_runs import new
from tests.waiting.world import Waits

SECONDS = 20.0


@pytest.fixture
async def other(ledger_url: str) -> AsyncIterator[Database]:
    """The connections of another node."""
    database = Database(ledger_url, setting="LEDGER_URL")
    yield database
    await database.dispose()


@pytest.fixture
async def tasks(waits: Waits) -> tuple[Task, Task]:
    """A task whose runs are members, and one that follows."""
    mail, report = make_task("mail", None, overlap="allow"), make_task("report", None)
    await waits.know(mail, report)
    return mail, report


async def group(
    world: Waits, tasks: tuple[Task, Task], *states: RunState, **given: Any
) -> tuple[str, list[str]]:
    """A group whose members are in these states. Returns the ids of its follow-up and of the
    members.
    """
    mail, report = tasks
    follow_up = await start_all([Start(mail.cls) for _ in states], then=Start(report.cls, **given))
    assert follow_up is not None
    members = [row["id"] for row in await rows(world.ledger, awaited_by=follow_up)]
    for run, state in zip(members, states, strict=True):
        if state != RunState.QUEUED:
            await world.start(run)
        if state not in (RunState.QUEUED, RunState.RUNNING):
            await world.finish(run, state)
    return follow_up, members


async def state_of(world: Waits, run: str) -> str:
    return str((await rows(world.ledger, id=run))[0]["state"])


def succeeded(run: str) -> Outcome:
    now = clock.now()
    return Outcome(run, 1, RunState.SUCCEEDED, "succeeded", 1, NODE, "mail", now, now)


async def look(connection: AsyncConnection) -> int:
    return (await open_and_close(connection, {}, clock.now())).number


@asynccontextmanager
async def meanwhile(
    ledger: Database, what: Callable[[], Awaitable[object]]
) -> AsyncIterator[asyncio.Task[object]]:
    """Begin it, and continue when it waits for a lock that the block around this holds. It ends
    after the block.
    """
    doing = asyncio.ensure_future(what())
    if ledger.kind == "postgresql":
        await until(lambda: _waits_for_a_lock(ledger), SECONDS)
    else:
        # SQLite does not show who waits: this only gives an error the time to appear.
        await asyncio.sleep(0.1)
    assert not doing.done()
    yield doing


async def _waits_for_a_lock(ledger: Database) -> bool:
    found = text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
        "AND datname = current_database()"
    )
    async with ledger.engine.connect() as connection:
        return bool((await connection.execute(found)).scalar_one())


# Look after the commit.


@pytest.mark.parametrize("ledger_url", ["postgresql"], indirect=True)
async def test_a_look_inside_the_transactions_of_two_last_members_would_miss_their_end(
    waits: Waits, tasks: tuple[Task, Task], other: Database
) -> None:
    """This is why the look is after the commit. (SQLite has no two such transactions.)"""
    follow_up, (first, second) = await group(waits, tasks, RunState.RUNNING, RunState.RUNNING)
    async with waits.ledger.engine.begin() as one, other.engine.begin() as two:
        await transitions.finish(one, [succeeded(first)])
        await transitions.finish(two, [succeeded(second)])
        assert [await look(one), await look(two)] == [0, 0]
    assert await state_of(waits, follow_up) == "waiting"
    async with other.engine.begin() as connection:
        assert await look(connection) == 1
    assert await state_of(waits, follow_up) == "queued"


async def test_two_nodes_that_end_the_last_members_at_the_same_moment_open_what_follows(
    waits: Waits, tasks: tuple[Task, Task], other: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real engines, whose outcomes are both written before either is committed. Nobody else
    looks.
    """
    follow_up, members = await group(waits, tasks, RunState.QUEUED, RunState.QUEUED)
    finish, both = (
        transitions.finish,
        asyncio.Barrier(2 if waits.ledger.kind == "postgresql" else 1),
    )

    async def finish_together(
        connection: AsyncConnection, outcomes: Sequence[Outcome], *given: Any
    ) -> list[Outcome]:
        lost = await finish(connection, outcomes, *given)
        if outcomes and outcomes[0].task == "mail":
            await both.wait()
        return lost

    monkeypatch.setattr(transitions, "finish", finish_together)
    engines, openers, only_members = [], [], {"mail": waits.tasks["mail"]}
    for database, node in ((waits.ledger, NODE), (other, tables.new_id())):
        opener = Opener(database, {}, lambda: None)
        engines.append(
            LocalEngine(database, only_members, node, max_running=1, on_ended=opener.on_ended)
        )
        openers.append(opener)
    for part in (*openers, *engines):
        part.start()
    try:
        await until(lambda: have_ended(waits, members, engines), SECONDS)
        await until(lambda: rows(waits.ledger, id=follow_up, state="queued"), SECONDS)
    finally:
        for part in (*engines, *openers):
            await part.stop()


async def test_a_node_looks_after_the_commit_of_what_it_has_written(
    waits: Waits, tasks: tuple[Task, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What wakes its opener comes after the commit: a look that has begun before may not see the
    end of the run.
    """
    await group(waits, tasks, RunState.QUEUED)
    finish, order = transitions.finish, list[str]()

    async def finish_in_order(
        connection: AsyncConnection, outcomes: Sequence[Outcome], *given: Any
    ) -> list[Outcome]:
        order.extend("written" for outcome in outcomes if outcome.task == "mail")
        return await finish(connection, outcomes, *given)

    def see_end(outcomes: Sequence[Outcome]) -> None:
        order.extend("looked" for outcome in outcomes if outcome.is_awaited)

    def see_commit(_: Connection) -> None:
        order.append("committed")

    monkeypatch.setattr(transitions, "finish", finish_in_order)
    event.listen(waits.ledger.engine.sync_engine, "commit", see_commit)
    engine = LocalEngine(
        waits.ledger, {"mail": waits.tasks["mail"]}, NODE, max_running=1, on_ended=see_end
    )

    async def has_looked() -> bool:
        engine.wake()
        return "looked" in order

    engine.start()
    try:
        await until(has_looked, SECONDS)
    finally:
        await engine.stop()
    assert order[order.index("written") :][:3] == ["written", "committed", "looked"]


async def have_ended(world: Waits, members: list[str], engines: list[LocalEngine]) -> bool:
    """Whether these runs have succeeded. The engines, which no heartbeat wakes here, are woken
    until then.
    """
    for engine in engines:
        engine.wake()
    return {await state_of(world, run) for run in members} == {"succeeded"}


# The waiting run is the lock, and the second statement decides.


async def test_a_retry_between_the_decision_and_its_commit_is_not_lost(
    waits: Waits, tasks: tuple[Task, Task], other: Database
) -> None:
    """A node has decided to close the follow-up, and a person retries the failed member: it has to
    wait again.
    """
    follow_up, (member,) = await group(waits, tasks, RunState.FAILED)

    async def retry_it() -> None:
        async with other.engine.begin() as connection:
            await retry(connection, member, "ann")

    async with waits.ledger.engine.begin() as connection:
        decided = await gates.decide(connection, clock.now())
        assert list(decided.closing) == [follow_up]
        async with meanwhile(waits.ledger, retry_it) as retrying:
            await gates.apply(connection, decided, clock.now())
    await retrying
    assert await state_of(waits, member) == "queued"
    assert await state_of(waits, follow_up) == "waiting"
    await waits.start(member)
    await waits.finish(member)
    assert await waits.look() == 1
    assert await state_of(waits, follow_up) == "queued"


@pytest.mark.parametrize("ledger_url", ["postgresql"], indirect=True)
async def test_without_the_lock_a_retry_would_be_lost(
    waits: Waits, tasks: tuple[Task, Task], other: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without the lock of the retry. (On SQLite nobody can write between decision and
    commit.)
    """
    follow_up, (member,) = await group(waits, tasks, RunState.FAILED)

    async def find_only(*_: object) -> list[str]:
        return [follow_up]

    async with waits.ledger.engine.begin() as connection:
        decided = await gates.decide(connection, clock.now())
        monkeypatch.setattr(transitions.waits, "lock_awaiting", find_only)
        async with other.engine.begin() as second:
            await retry(second, member, "ann")
        await gates.apply(connection, decided, clock.now())
    assert (await state_of(waits, member), await state_of(waits, follow_up)) == (
        "queued",
        "skipped",
    )


@pytest.mark.parametrize("ledger_url", ["postgresql"], indirect=True)
async def test_a_retry_while_the_look_takes_its_locks_is_seen_by_the_second_statement(
    waits: Waits, tasks: tuple[Task, Task], other: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The locking statement has begun before the retry: it still sees the failed member, and locks
    the follow-up.
    """
    follow_up, (member,) = await group(waits, tasks, RunState.FAILED)
    ready_ids, ready, locked = waits_module.ready_ids, waits_module.ready, []

    def held_up(
        kind: str, most: int = 1, locks: bool = False, only: bool = False, first: str | None = None
    ) -> str:
        statement = ready_ids(kind, most, locks, only, first)
        gate = "WITH gate AS MATERIALIZED (SELECT pg_advisory_xact_lock_shared(42) AS passed)"
        passed = " WHERE (SELECT count(passed) FROM gate) = 1 AND "
        return f"{gate} {statement.replace(' WHERE ', passed, 1)}"

    async def and_kept(*given: Any) -> list[waits_module.WaitingRun]:
        locked.extend(await ready(*given))
        return locked

    monkeypatch.setattr(waits_module, "ready_ids", held_up)
    monkeypatch.setattr(waits_module, "ready", and_kept)

    async def open_or_close() -> int:
        async with other.engine.begin() as connection:
            return await look(connection)

    async with waits.ledger.engine.begin() as gate:
        await gate.execute(text("SELECT pg_advisory_xact_lock(42)"))
        async with (
            meanwhile(waits.ledger, open_or_close) as looking,
            waits.ledger.engine.begin() as connection,
        ):
            await retry(connection, member, "ann")
    assert await looking == 0
    assert [run.id for run in locked] == [follow_up], (
        "the first statement alone would have closed it"
    )
    assert await state_of(waits, follow_up) == "waiting"


async def test_what_a_person_is_retrying_is_left_alone_by_a_look(
    waits: Waits, tasks: tuple[Task, Task], other: Database
) -> None:
    follow_up, (member,) = await group(waits, tasks, RunState.FAILED)

    async def look_too() -> int:
        async with other.engine.begin() as connection:
            return await look(connection)

    async with waits.ledger.engine.begin() as connection:
        await retry(connection, member, "ann")
        looking = asyncio.ensure_future(look_too())
        if waits.ledger.kind == "postgresql":  # it passes by the locked row, and waits for nobody
            assert await asyncio.wait_for(looking, SECONDS) == 0
    assert await looking == 0
    assert await state_of(waits, follow_up) == "waiting"


async def test_two_openers_open_each_run_once(
    waits: Waits, tasks: tuple[Task, Task], other: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "MOST", 10)
    ids = {await start(tasks[0].cls, delay=60) for _ in range(30)}
    clock.advance(timedelta(minutes=2))
    opened: list[str] = []

    async def take(database: Database, enough: asyncio.Barrier) -> None:
        async with database.engine.begin() as connection:
            decided = await gates.decide(connection, clock.now())
            # Both have decided before either is committed.
            await asyncio.wait_for(enough.wait(), SECONDS)
            assert await gates.apply(connection, decided, clock.now()) == len(decided.opening)
        opened.extend(run.id for run in decided.opening)

    both = asyncio.Barrier(2 if waits.ledger.kind == "postgresql" else 1)
    await asyncio.gather(take(waits.ledger, both), take(other, both))
    assert len(opened) == len(set(opened)) == 20
    await take(other, asyncio.Barrier(1))
    assert len(opened) == 30 and set(opened) == ids
    assert {row["state"] for row in await rows(waits.ledger)} == {"queued"}


# Late members, and cancels.


async def test_a_member_that_joins_late_keeps_its_group_open(
    waits: Waits, tasks: tuple[Task, Task], other: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that starts it can't end before the commit: its row is locked, so no look sees the
    group without it.
    """
    follow_up, (member,) = await group(waits, tasks, RunState.RUNNING)
    calling = SimpleNamespace(id=member, fence=1, task="mail")
    monkeypatch.setattr(enqueue, "current_run_if_any", lambda: calling)
    write, reached, go_on = enqueue.write, asyncio.Event(), asyncio.Event()

    async def held_up(*given: Any) -> str:
        reached.set()
        await go_on.wait()
        return await write(*given)

    monkeypatch.setattr(enqueue, "write", held_up)

    async def end() -> None:
        async with other.engine.begin() as connection:
            assert await transitions.finish(connection, [succeeded(member)]) == []

    joining = asyncio.ensure_future(start(tasks[0].cls, in_group=True))
    await asyncio.wait_for(reached.wait(), SECONDS)
    async with meanwhile(waits.ledger, end) as ending:
        go_on.set()
        late = await joining
    await ending
    assert await waits.look() == 0
    await waits.start(late)
    await waits.finish(late)
    assert await waits.look() == 1
    assert await state_of(waits, follow_up) == "queued"


async def test_a_run_that_has_ended_lets_nobody_join_its_group(
    waits: Waits, tasks: tuple[Task, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that is still executed by a node which has lost it."""
    follow_up, (member,) = await group(waits, tasks, RunState.SUCCEEDED)
    monkeypatch.setattr(
        enqueue, "current_run_if_any", lambda: SimpleNamespace(id=member, fence=1, task="mail")
    )
    with pytest.raises(LeaseLost, match="so it can start nothing in its group"):
        await start(tasks[0].cls, in_group=True)
    assert len(await rows(waits.ledger, awaited_by=follow_up)) == 1


async def test_a_cancel_while_a_run_is_opened_cancels_the_opened_run(
    waits: Waits, tasks: tuple[Task, Task], other: Database
) -> None:
    follow_up, _ = await group(waits, tasks, RunState.SUCCEEDED)

    async def cancel() -> None:
        async with other.engine.begin() as connection:
            await request_cancel(connection, follow_up, "cancelled by ann", "ann")

    async with waits.ledger.engine.begin() as connection:
        decided = await gates.decide(connection, clock.now())
        async with meanwhile(waits.ledger, cancel) as cancelling:
            assert await gates.apply(connection, decided, clock.now()) == 1
    await cancelling
    (row,) = await rows(waits.ledger, id=follow_up)
    assert (row["state"], row["reason"], row["cancel_by"]) == (
        "cancelled",
        "cancelled by ann",
        "ann",
    )


async def test_what_a_person_has_cancelled_is_not_opened(
    waits: Waits, tasks: tuple[Task, Task], other: Database
) -> None:
    follow_up, _ = await group(waits, tasks, RunState.SUCCEEDED)

    async def look_too() -> int:
        async with other.engine.begin() as connection:
            return await look(connection)

    async with waits.ledger.engine.begin() as connection:
        await request_cancel(connection, follow_up, "cancelled by ann", "ann")
        looking = asyncio.ensure_future(look_too())
        if waits.ledger.kind == "postgresql":
            assert await asyncio.wait_for(looking, SECONDS) == 0
    assert await looking == 0
    assert await state_of(waits, follow_up) == "cancelled"


# Lanes, and connections.


async def test_a_run_that_waits_and_has_not_begun_holds_no_lane(ledger: Database) -> None:
    begun = {"attempt": 1, "state": RunState.WAITING}
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [new(state=RunState.WAITING), new(state=RunState.WAITING)])
        await runs.insert(connection, [new(state=RunState.RUNNING, attempt=1)])
        await runs.insert(connection, [new("b", **begun)])
    for one_more in (new("b", **begun), new("b", state=RunState.RUNNING, attempt=1)):
        with pytest.raises(IntegrityError):
            async with ledger.engine.begin() as connection:
                await runs.insert(connection, [one_more])


async def test_a_run_that_waits_again_after_a_retry_holds_no_lane(ledger: Database) -> None:
    """Its attempts before the retry do not count."""
    async with ledger.engine.begin() as connection:
        again = new("t", attempt=2)
        await runs.insert(connection, [again])
        await connection.execute(update(tables.runs).values(attempts_before=2, state="waiting"))
        await runs.insert(connection, [new("t", state=RunState.RUNNING, attempt=1)])


@pytest.mark.parametrize("ledger_url", ["postgresql"], indirect=True)
async def test_postgresql_compiles_no_statement_of_ours(ledger: Database) -> None:
    for engine in (ledger.engine, ledger.reader):
        async with engine.connect() as connection:
            assert (await connection.execute(text("SHOW jit"))).scalar_one() == "off"


@pytest.mark.parametrize("ledger_url", ["sqlite"], indirect=True)
async def test_sqlite_looks_only_at_the_runs_that_wait(ledger: Database) -> None:
    async with ledger.engine.connect() as connection:
        statement = text(f"EXPLAIN QUERY PLAN {waits_module.ready_ids('sqlite', 500)}")
        plan = [str(row[-1]) for row in await connection.execute(statement, {"now": "2026-03-10"})]
    assert plan[0] == "SEARCH r USING INDEX ix_batch_runs_waits (due_at<?)"


@pytest.mark.parametrize("ledger_url", ["sqlite"], indirect=True)
async def test_sqlite_refuses_to_look_without_the_index_instead_of_reading_all_runs(
    ledger: Database,
) -> None:
    async with ledger.engine.begin() as connection:
        await connection.execute(text("DROP INDEX ix_batch_runs_waits"))
        with pytest.raises(OperationalError, match="no such index: ix_batch_runs_waits"):
            await waits_module.is_any_ready(connection, clock.now())
