"""The local engine beside other code in its process that claims runs: each run is started once."""

from __future__ import annotations

import asyncio

import pytest

from service import clock
from service.batch.execution.local_engine import LocalEngine
from service.batch.ledger import runs
from service.batch.ledger.states import RunState
from service.batch.tasks.registry import Task
from service.database.engine import Database
from service.testing.engine import DrivenEngine
from tests.batch.ledger_world import NODE, know, make_task, rows
from tests.batch.test_runs import new


class Counted:
    """A task that counts how often its body begins."""

    def __init__(self) -> None:
        self.begun = 0
        self.may_end = asyncio.Event()

        async def run(_: object) -> None:
            self.begun += 1
            await self.may_end.wait()

        self.task: Task = make_task("t", None, run=run)


async def commit_a_claim(ledger: Database) -> runs.Claimed:
    """Insert a running run, as a firing does before it launches the run on its node."""
    at = clock.now()
    started = {"node": NODE, "fence": 1, "attempt": 1, "started_at": at, "attempt_started_at": at}
    made = new(state=RunState.RUNNING, **started)
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [made])
    return runs.claimed_from(made)


@pytest.mark.parametrize("await_of_the_turn", ["_has_claimable", "_write"])
async def test_a_recheck_requested_during_a_turn_starts_no_run_twice(
    ledger: Database, monkeypatch: pytest.MonkeyPatch, await_of_the_turn: str
) -> None:
    """A recheck holds `claiming` all the time, so that it does not see runs that are about to be launched.

    Two firings follow each other: the COMMIT of the first gets no reply, the runs of the second are being launched.
    """
    counted = Counted()
    engine = DrivenEngine(ledger, await know(ledger, counted.task), NODE)
    original = getattr(LocalEngine, await_of_the_turn)
    is_there, may_go_on = asyncio.Event(), asyncio.Event()

    async def slowly(self: LocalEngine, *args: object, **more: object) -> object:
        is_there.set()
        await may_go_on.wait()
        return (await original(self, *args, **more)) or await_of_the_turn == "_has_claimable"

    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, await_of_the_turn, slowly)
        if await_of_the_turn == "_write":
            patch.setattr(LocalEngine, "_has_claimable", lambda _: asyncio.sleep(0, True))
        turn = asyncio.create_task(engine._turn())
        await is_there.wait()
        engine.recheck_claims()
        async with engine.claiming:
            claimed = await commit_a_claim(ledger)
            may_go_on.set()
            await turn
            engine.launch([claimed], engine.losses)
    is_recheck_due = engine.is_recheck_due
    await asyncio.sleep(0)
    counted.may_end.set()
    await engine.settle()
    assert (counted.begun, is_recheck_due, engine.is_recheck_due) == (1, True, False)
    assert [row["state"] for row in await rows(ledger)] == ["succeeded"]
