"""An opening waits for nobody, and code that cancels groups locks by id, so no two of them
deadlock. On PostgreSQL.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import Start, clock, start_all
from batch_system.batch.ledger import tables, transitions
from batch_system.batch.ledger.states import RunState
from batch_system.batch.queue import gates
from batch_system.batch.queue.gates import Decided
from batch_system.database.engine import Database
from tests.batch.ledger_world import make_task, rows, until_waiting
from tests.waiting.world import START, Waits

pytestmark = pytest.mark.parametrize("ledger_url", ["postgresql"], indirect=True)

SECONDS = 20.0
FIRST, SECOND = START + timedelta(minutes=30), START + timedelta(minutes=90)


@pytest.fixture
async def other(ledger_url: str) -> AsyncIterator[Database]:
    """The connections of another node."""
    database = Database(ledger_url, setting="LEDGER_URL")
    yield database
    await database.dispose()


async def cancel(ledger: Database, ids: Sequence[str]) -> dict[str, RunState]:
    async with ledger.engine.begin() as connection:
        return await transitions.cancel(connection, ids, "cancelled by ann", "ann", clock.now())


async def lock(connection: AsyncConnection, run: str) -> None:
    await connection.execute(
        select(tables.runs.c.id).where(tables.runs.c.id == run).with_for_update()
    )


@pytest.fixture
async def replacing(waits: Waits) -> tuple[str, str]:
    """A running run, and the one of a newer slot that waits and would replace it: what it waited
    for is over.
    """
    extract = make_task("extract", "0 * * * *", overlap="allow")
    await waits.know(extract, make_task("load", None, after="extract", overlap="replace"))
    for slot in (FIRST, SECOND):
        await waits.fire(slot)
        await waits.end("extract", slot)
        if slot == FIRST:
            assert await waits.look() == 1
            await waits.start((await waits.run_of("load", FIRST))["id"])
    old, new = await waits.run_of("load", FIRST), await waits.run_of("load", SECOND)
    assert (old["state"], new["state"]) == ("running", "waiting")
    return old["id"], new["id"]


async def test_an_opening_leaves_a_slot_whose_turn_it_would_have_to_wait_for(
    waits: Waits, replacing: tuple[str, str], other: Database
) -> None:
    old, new = replacing
    async with other.engine.begin() as connection:
        await lock(connection, old)
        assert await asyncio.wait_for(waits.look(), SECONDS) == 0
    assert await waits.look() == 1
    states = {
        row["id"]: (row["state"], row["cancel_reason"] is not None)
        for row in await rows(waits.ledger)
    }
    assert (states[old], states[new]) == (("running", True), ("queued", False))


async def test_an_opening_that_replaces_and_a_cancel_of_both_runs_do_not_deadlock(
    waits: Waits, replacing: tuple[str, str], other: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The opening has locked the new run. The cancel has locked the old one, and waits for the new
    one.
    """
    apply, cancelling = gates.apply, list[asyncio.Task[dict[str, RunState]]]()

    async def apply_beside(connection: AsyncConnection, decided: Decided, now: datetime) -> int:
        cancelling.append(asyncio.create_task(cancel(other, replacing)))
        await until_waiting(waits.ledger, 1, SECONDS)
        return await apply(connection, decided, now)

    monkeypatch.setattr(gates, "apply", apply_beside)
    assert await waits.look() == 0
    old, new = replacing
    assert await cancelling[0] == {old: RunState.RUNNING, new: RunState.CANCELLED}


async def test_two_cancels_of_groups_and_of_their_members_do_not_deadlock(
    waits: Waits, other: Database
) -> None:
    """A third transaction stops both halfway, when each has locked runs that the other one needs
    next.
    """
    mail, report = (
        make_task("mail", None, overlap="allow"),
        make_task("report", None, overlap="allow"),
    )
    await waits.know(mail, report)
    groups = [await start_all([Start(mail.cls)], then=Start(report.cls)) for _ in range(2)]
    first, second = (str(group) for group in groups)
    (member,) = [row["id"] for row in await rows(waits.ledger, awaited_by=first)]
    assert first < member < second
    async with waits.ledger.engine.begin() as connection:
        await lock(connection, second)
        both = [asyncio.create_task(cancel(other, [first, second]))]
        await until_waiting(waits.ledger, 1, SECONDS)
        both.append(asyncio.create_task(cancel(other, [member, second])))
        await until_waiting(waits.ledger, 2, SECONDS)
    await asyncio.gather(*both)
    assert {row["state"] for row in await rows(waits.ledger)} == {"cancelled"}
