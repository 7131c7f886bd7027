"""A ledger in which many runs wait, and the statements about them, whose plans
tests/batch/test_plans.py reads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import (
    chains,
    json_rows,
    parts,
    runs,
    transitions,
    waits,
)
from batch_system.batch.ledger.parts import PartsGate, Split
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import Rank
from batch_system.batch.queue import gates
from batch_system.database.engine import Database
from batch_system.operations.runs import chain
from batch_system.operations.runs.awaited import awaited, blocked_runs
from tests.batch.test_runs import new

Of = Callable[[str], AbstractContextManager[None]]

MINUTE = timedelta(minutes=1)


def slots(number: int, now: datetime) -> tuple[list[NewRun], list[dict[str, Any]]]:
    """So many runs that wait for slots of two other tasks, these slots' runs, which are queued, and
    rows of waits.
    """
    made, rows = [], []
    for n in range(number):
        slot = now - timedelta(days=100) + n * MINUTE
        of_slot = {
            "slot": slot,
            "origin": "schedule",
            "exclusive": None,
            "due_at": now,
            "created_at": now,
        }
        upstreams = [new(name, **of_slot) for name in ("up-1", "up-2")]
        run = new(
            "down", **of_slot, state="waiting", gate="success", wait_until=now + timedelta(days=1)
        )
        made += [*upstreams, run]
        rows += [{"run": run.id, "task": upstream.task, "slot": slot} for upstream in upstreams]
    return made, rows


def group(number: int, now: datetime, state: str = "queued", **follow_up: Any) -> list[NewRun]:
    """A follow-up that waits, and so many members."""
    then = new(
        "then", exclusive=None, due_at=now, **{"state": "waiting", "gate": "success", **follow_up}
    )
    return [
        then,
        *(new("member", exclusive=None, state=state, awaited_by=then.id) for _ in range(number)),
    ]


async def write(
    connection: AsyncConnection, made: list[NewRun], rows: list[dict[str, Any]]
) -> None:
    await json_rows.insert(connection, runs.runs, [vars(run) for run in made])
    await json_rows.insert(connection, waits.waits, rows)


async def fill(ledger: Database, number: int, now: datetime) -> None:
    """This number of runs that wait for slots, as many that wait for tomorrow, and as many members
    of groups.
    """
    tomorrow = [
        new("later", exclusive=None, state="waiting", due_at=now + timedelta(days=1))
        for _ in range(number)
    ]
    groups = [run for _ in range(number // 10) for run in group(10, now)]
    made, rows = slots(number, now)
    async with ledger.engine.begin() as connection:
        await write(connection, [*made, *tomorrow, *groups], rows)
    if ledger.kind == "postgresql":
        async with ledger.engine.begin() as connection:
            await connection.execute(text("ANALYZE batch_runs, batch_waits"))


async def send(ledger: Database, of: Of, now: datetime) -> None:
    """Open and close what is ready, and retry and cancel runs that others wait for. `of`: see
    Plans.of.
    """
    ready, closed, cancelled = (group(3, now, state) for state in ("succeeded", "failed", "queued"))
    (upstream, *others), rows = slots(1, now + timedelta(days=1))
    upstream.state = "failed"
    async with ledger.engine.begin() as connection:
        await write(connection, [*ready, *closed, *cancelled, upstream, *others], rows)
        with of("open"):
            assert await waits.is_any_ready(connection, now)
            decided = await gates.decide(connection, now)
            assert await gates.apply(connection, decided, now) == 2
            await waits.slots(connection, [others[-1].id])
        with of("what failed runs keep back"):
            await chains.kept_back_by_errors(connection, [("up-1", "1:boom"), ("up-2", "1:boom")])
            await chains.kept_back_by_run(connection, upstream.id)
        with of("blocked runs"):
            await blocked_runs(connection, [], now + timedelta(days=1), MINUTE)
            await awaited(connection, [others[-1].id, cancelled[0].id], now)
        with of("a chain"):
            await chains.before(connection, [others[-1].id], 200)
            await chains.after(connection, [upstream.id], 200)
            await chains.members_by_state(connection, cancelled[0].id, 200)
            await chain.upcoming(connection, "later", now)
        with of("retry what others wait for"):
            assert await waits.lock_awaiting(connection, [upstream.id]) == [others[-1].id]
            await transitions.reopen(
                connection, [closed[1].id, upstream.id], Rank.MANUAL, "ann", now
            )
        follow_up = await runs.get(connection, closed[0].id)
        assert follow_up is not None and follow_up["state"] == "waiting"
        with of("cancel a group"):
            await transitions.cancel(connection, [cancelled[0].id], "cancelled by ann", "ann", now)
        with of("resume what waits"):
            await waits.extend(connection, "down", MINUTE, now)
        with of("parts"):
            await send_parts(connection, now)


async def send_parts(connection: AsyncConnection, now: datetime) -> None:
    """Split a run, read its parts, fail it because of them, and split it again."""
    run = new("then", exclusive="then", state="waiting", gate="fail_fast", attempt=1)
    await json_rows.insert(connection, runs.runs, [vars(run)])
    split = Split(PartsGate.FAIL_FAST, "then/parts", [{"n": n} for n in range(50)])
    await parts.insert(connection, run.id, split, split.rows(connection.dialect.name), now)
    (tally,) = (await parts.tallies(connection, [run.id])).values()
    assert (tally.number, tally.active) == (50, 50)
    assert len(await parts.of_run(connection, run.id, 20)) == 20
    assert len(await parts.states_in_order(connection, run.id, 50, 10)) == 10
    assert len(await parts.startable_ids(connection, run.id, now, 5)) == 5
    await transitions.cancel(
        connection, await parts.active_ids(connection, run.id), "stopped", "ann", now
    )
    decided = await gates.decide(connection, now)
    assert [failing["reason"] for failing in decided.failing] == [
        f"50 of 50 parts cancelled: {LISTED} and 40 more"
    ]
    await gates.apply(connection, decided, now)
    assert await transitions.reopen(connection, [run.id], Rank.MANUAL, "ann", now, anew=True) == {
        run.id
    }
    assert await parts.tallies(connection, [run.id]) == {}


LISTED = ", ".join(map(str, range(1, 11)))
