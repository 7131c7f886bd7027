"""Claiming and finishing runs: each is one statement, which names the states that a run may change
from.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update
from sqlalchemy.exc import IntegrityError

from batch_system import clock
from batch_system.batch.ledger import run_query, runs, tables, transitions
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.run_query import RunQuery
from batch_system.batch.ledger.runs import Claimed, NewRun
from batch_system.batch.ledger.states import FINAL, TRANSITIONS, Origin, Rank, RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.nodes import ledger_poll
from batch_system.batch.queue import claiming
from batch_system.batch.queue.claiming import Capacity
from batch_system.database.engine import Database
from tests.batch.ledger_world import NODE, know, make_task, rows

NOW = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)


def new(task: str = "t", **changes: object) -> NewRun:
    base = NewRun(
        id=new_id(),
        task=task,
        slot=None,
        origin=Origin.MANUAL,
        state=RunState.QUEUED,
        rank=Rank.MANUAL,
        catch_up=False,
        due_at=NOW,
        created_at=NOW,
        exclusive=task,
    )
    return replace(base, **changes)


async def insert(ledger: Database, *many: NewRun) -> set[str]:
    async with ledger.engine.begin() as connection:
        return await runs.insert(connection, many)


async def claim(ledger: Database, *names: str, limit: int = 10, node: str = NODE) -> list[Claimed]:
    async with ledger.engine.begin() as connection:
        due = (await claiming.due(connection)).names
        heads = await claiming.heads(
            connection, [name for name in names if name in due], NOW, limit
        )
        return await transitions.claim(connection, [head.id for head in heads], node, NOW)


def ending(claimed: Claimed, state: RunState = RunState.SUCCEEDED, **changes: object) -> Outcome:
    at = NOW + timedelta(seconds=5)
    outcome = Outcome(
        claimed.id, claimed.fence, state, state, claimed.attempt, NODE, claimed.task, NOW, at
    )
    return replace(outcome, **changes)


async def finish(ledger: Database, *outcomes: Outcome) -> list[Outcome]:
    async with ledger.engine.begin() as connection:
        return await transitions.finish(connection, outcomes)


async def test_two_queued_runs_of_one_task_never_stall_claiming(ledger: Database) -> None:
    first, second, other = new(), new(), new("other")
    await insert(ledger, first, second, other)
    queues = ("t", "other")
    assert {one.id for one in await claim(ledger, *queues)} == {first.id, other.id}
    assert await claim(ledger, *queues) == []
    await finish(ledger, *[ending(one) for one in await held(ledger)])
    assert [one.id for one in await claim(ledger, *queues)] == [second.id]


async def held(ledger: Database) -> list[Claimed]:
    async with ledger.engine.connect() as connection:
        return await claiming.held_by(connection, NODE, [])


async def test_a_backlog_of_one_task_does_not_hide_other_tasks(ledger: Database) -> None:
    backlog = [
        new("big", rank=Rank.CATCH_UP, due_at=NOW - timedelta(hours=1)) for _ in range(2_000)
    ]
    await insert(ledger, *backlog, new("small"))
    claimed = await claim(ledger, "big", "small", limit=2)
    assert {one.task for one in claimed} == {"big", "small"}


@pytest.mark.parametrize("pool", ["default", "cpu"])
async def test_a_backlog_that_lacks_threads_or_children_does_not_hide_runs_that_have_room(
    ledger: Database, pool: str
) -> None:
    def in_a_thread(_: object) -> None: ...

    big = make_task("big", None, run=in_a_thread, overlap="allow", pool=pool)
    loaded = await know(ledger, big, make_task("small", None, overlap="allow"))
    await insert(
        ledger, *(new("big", exclusive=None) for _ in range(20)), new("small", exclusive=None)
    )
    async with ledger.engine.begin() as connection:
        room = Capacity(runs=10, threads=2, pools={"default": None, "cpu": 2})
        claimed, _ = await claiming.take(connection, loaded, NODE, room)
    assert sorted(one.task for one in claimed) == ["big", "big", "small"]


async def test_a_node_claims_only_tasks_that_it_has_loaded(ledger: Database) -> None:
    await insert(
        ledger,
        new("mine"),
        new("theirs"),
        new("free", exclusive=None),
        new("unknown", exclusive=None),
    )
    claimed = await claim(ledger, "mine", "free")
    assert {one.task for one in claimed} == {"mine", "free"}


async def test_the_order_is_interrupted_then_on_time_then_manual_then_catch_up(
    ledger: Database,
) -> None:
    wanted = [Rank.INTERRUPTED, Rank.ON_TIME, Rank.MANUAL, Rank.CATCH_UP]
    queue = [new(rank=rank) for rank in reversed(wanted)]
    await insert(ledger, *queue)
    order = []
    while claimed := await claim(ledger, "t"):
        order += claimed
        await finish(ledger, *[ending(one) for one in claimed])
    ranks = {run.id: run.rank for run in queue}
    assert [ranks[one.id] for one in order] == wanted


async def test_with_little_capacity_the_higher_priority_goes_first(ledger: Database) -> None:
    await insert(ledger, new("low", priority=-5), new("high", priority=5), new("plain"))
    (claimed,) = await claim(ledger, "low", "high", "plain", limit=1)
    assert claimed.task == "high"


@pytest.mark.parametrize("state", [RunState.QUEUED, RunState.INTERRUPTED])
async def test_a_queued_run_may_start_even_if_the_clock_of_its_maker_was_ahead(
    ledger: Database, state: RunState
) -> None:
    """`due_at` lies in the future if that clock was ahead, or was set back since."""
    await insert(ledger, new(state=state, due_at=NOW + timedelta(hours=1)))
    async with ledger.engine.connect() as connection:
        with clock.moved(NOW):
            assert (await claiming.due(connection)).names == {"t"}
            assert (await ledger_poll.read(connection, NODE)).is_claimable
    assert len(await claim(ledger, "t")) == 1


async def test_a_retry_that_is_not_due_yet_waits(ledger: Database) -> None:
    await insert(ledger, new(state=RunState.RETRYING, due_at=NOW + timedelta(microseconds=1)))
    assert await claim(ledger, "t") == []
    async with ledger.engine.connect() as connection:
        with clock.moved(NOW):
            assert await claiming.due(connection) == claiming.Due(NOW, frozenset(), retries=False)
        with clock.moved(NOW + timedelta(seconds=1)):
            later = NOW + timedelta(seconds=1)
            assert await claiming.due(connection) == claiming.Due(
                later, frozenset({"t"}), retries=True
            )
        assert abs((await claiming.due(connection)).now - clock.now()) < timedelta(seconds=5)


async def test_claiming_raises_the_fence_and_counts_the_attempt(ledger: Database) -> None:
    await insert(ledger, new())
    (first,) = await claim(ledger, "t")
    assert (first.fence, first.attempt) == (1, 1)
    retry = ending(first, RunState.RETRYING, due_at=NOW, outcome="failed")
    assert await finish(ledger, retry) == []
    (second,) = await claim(ledger, "t")
    assert (second.fence, second.attempt) == (2, 2)


async def test_an_interrupted_run_goes_on_with_its_attempt(ledger: Database) -> None:
    await insert(ledger, new())
    (first,) = await claim(ledger, "t")
    await finish(ledger, ending(first, RunState.INTERRUPTED, due_at=NOW, rank=Rank.INTERRUPTED))
    (run,) = await rows(ledger)
    assert (run["state"], run["finished_at"], run["rank"]) == (
        "interrupted",
        None,
        Rank.INTERRUPTED,
    )
    (again,) = await claim(ledger, "t")
    assert (again.fence, again.attempt) == (2, 1)
    await finish(ledger, ending(again))
    attempts = await rows(ledger, tables.attempts)
    assert [(a["fence"], a["number"], a["outcome"]) for a in attempts] == [
        (1, 1, "interrupted"),
        (2, 1, "succeeded"),
    ]


async def test_many_nodes_claiming_at_once_get_each_run_once(
    ledger: Database, ledger_url: str
) -> None:
    await insert(
        ledger,
        *[new(f"t{i}") for i in range(200)],
        *[new("free", exclusive=None) for _ in range(200)],
    )
    queues = [*(f"t{i}" for i in range(200)), "free"]
    others = [Database(ledger_url, setting="LEDGER_URL") for _ in range(4)]

    async def work(database: Database) -> list[Claimed]:
        taken: list[Claimed] = []
        for _ in range(30):
            taken += await claim(database, *queues, limit=20, node=new_id())
        return taken

    taken = [one.id for part in await asyncio.gather(*map(work, others)) for one in part]
    await asyncio.gather(*(one.dispose() for one in others))
    assert len(taken) == len(set(taken)) == 400


async def test_two_running_runs_of_one_exclusive_are_refused_by_the_database(
    ledger: Database,
) -> None:
    await insert(ledger, new(state=RunState.RUNNING, attempt=1))
    with pytest.raises(IntegrityError):
        await insert(ledger, new(state=RunState.RUNNING, attempt=1))


async def test_an_outcome_is_written_with_its_attempt(ledger: Database) -> None:
    await insert(ledger, new())
    (claimed,) = await claim(ledger, "t")
    error = {"type": "ValueError", "message": "no", "traceback": "…"}
    failed = ending(
        claimed, RunState.FAILED, reason="ValueError: no", error=error, result={"a": [1, None, "x"]}
    )
    assert await finish(ledger, failed) == []
    (run,) = await rows(ledger)
    assert (run["state"], run["reason"], run["result"]) == (
        "failed",
        "ValueError: no",
        {"a": [1, None, "x"]},
    )
    assert run["finished_at"] == NOW + timedelta(seconds=5)
    (attempt,) = await rows(ledger, tables.attempts)
    assert (attempt["number"], attempt["outcome"], attempt["error"]) == (1, "failed", error)
    assert (attempt["started_at"], attempt["ended_at"]) == (NOW, NOW + timedelta(seconds=5))


@pytest.mark.parametrize("result", ["text", "1", 7, 2.5, True, [], {}, ["ü", {"k": "v"}], None])
async def test_a_result_comes_back_as_it_was(ledger: Database, result: object) -> None:
    await insert(ledger, new())
    (claimed,) = await claim(ledger, "t")
    await finish(ledger, ending(claimed, result=result))
    (run,) = await rows(ledger)
    assert run["result"] == result


async def test_text_that_postgresql_cannot_hold_does_not_hold_up_the_group(
    ledger: Database,
) -> None:
    await insert(ledger, new("a"), new("b"))
    one, two = await claim(ledger, "a", "b")
    bad = ending(
        one,
        RunState.FAILED,
        reason="nul \0 and half \ud800 a pair",
        result={"k\0": "\udfff \\u0000"},
    )
    assert await finish(ledger, bad, ending(two)) == []
    states = {run["task"]: run["state"] for run in await rows(ledger)}
    assert states == {one.task: "failed", two.task: "succeeded"}


async def test_a_write_under_an_older_fence_is_refused_and_changes_nothing(
    ledger: Database,
) -> None:
    await insert(ledger, new())
    (old,) = await claim(ledger, "t")
    async with ledger.engine.begin() as connection:
        await connection.execute(update(tables.runs).values(fence=2, node=new_id()))
    late = ending(old)
    assert await finish(ledger, late) == [late]
    (run,) = await rows(ledger)
    assert run["state"] == "running"
    assert await rows(ledger, tables.attempts) == []


async def test_the_same_outcome_twice_is_not_taken_for_a_lost_lease(ledger: Database) -> None:
    """A group is written again if the reply to its COMMIT was lost."""
    await insert(ledger, new("a"), new("b"))
    one, two = await claim(ledger, "a", "b")
    await finish(ledger, ending(one))
    assert await finish(ledger, ending(one), ending(two)) == []
    assert len(await rows(ledger, tables.attempts)) == 2


async def test_of_a_group_only_the_runs_that_another_node_holds_are_refused(
    ledger: Database,
) -> None:
    await insert(ledger, new("a"), new("b"), new("c"))
    lost, recorded, fresh = await claim(ledger, "a", "b", "c")
    await finish(ledger, ending(recorded))
    async with ledger.engine.begin() as connection:
        await connection.execute(
            update(tables.runs).where(tables.runs.c.id == lost.id).values(fence=2, node=new_id())
        )
    late = ending(lost)
    assert await finish(ledger, late, ending(recorded), ending(fresh)) == [late]
    states = {run["task"]: run["state"] for run in await rows(ledger)}
    assert states == {lost.task: "running", recorded.task: "succeeded", fresh.task: "succeeded"}
    assert {row["run"] for row in await rows(ledger, tables.attempts)} == {recorded.id, fresh.id}


async def test_an_attempt_never_leaves_a_final_state(ledger: Database) -> None:
    await insert(ledger, new())
    (claimed,) = await claim(ledger, "t")
    await finish(ledger, ending(claimed))
    await finish(ledger, ending(claimed, RunState.FAILED))
    (run,) = await rows(ledger)
    assert run["state"] == "succeeded"
    # Only a person leads a run out of a final state.
    assert all(TRANSITIONS[state] == {RunState.QUEUED, RunState.WAITING} for state in FINAL)


@pytest.mark.rest
async def test_large_groups_are_not_quadratic(ledger: Database) -> None:
    """A statement that used the index on state for its join took minutes at this size."""
    await insert(ledger, *[new("free", exclusive=None) for _ in range(20_000)])
    claimed = await claim(ledger, "free", limit=20_000)
    assert len(claimed) == 20_000
    async with asyncio.timeout(30):
        assert await finish(ledger, *[ending(one) for one in claimed]) == []


async def test_the_listing_is_newest_first_and_pages_by_key(ledger: Database) -> None:
    made = [new(f"t{i % 2}", created_at=NOW + timedelta(seconds=i // 3)) for i in range(12)]
    await insert(ledger, *made)
    newest_first = [
        run.id for run in sorted(made, key=lambda run: (run.created_at, run.id), reverse=True)
    ]
    seen: list[str] = []
    before = None
    async with ledger.engine.connect() as connection:
        while True:
            page = await run_query.page(connection, RunQuery(), 5, before)
            seen += [row["id"] for row in page.rows]
            before = page.after
            if before is None:
                break
        query = RunQuery(task="t1", states=frozenset({"queued"}), created_since=NOW)
        of_one = (await run_query.page(connection, query, 50)).rows
    assert seen == newest_first
    assert {row["task"] for row in of_one} == {"t1"}


# SQLite has one writer: the second one waits.
@pytest.mark.parametrize("ledger_url", ["postgresql"], indirect=True)
async def test_nodes_that_claim_at_the_same_moment_find_different_runs(ledger: Database) -> None:
    tasks = {"any": make_task("any", overlap="allow")}
    await insert(ledger, *[new("any", exclusive=None) for _ in range(6)])
    async with ledger.engine.begin() as one, ledger.engine.begin() as other:
        mine, _ = await claiming.take(one, tasks, NODE, Capacity(3, 0))
        theirs, _ = await claiming.take(other, tasks, new_id(), Capacity(3, 0))
    assert len({run.id for run in [*mine, *theirs]}) == 6
