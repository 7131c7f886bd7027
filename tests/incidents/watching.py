"""A watch over a ledger, without a service around it: what it has noticed, opened, closed and
written to be sent.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select, text

from batch_system import clock
from batch_system.batch.incidents.watch import Watch
from batch_system.batch.incidents.watched import Thresholds
from batch_system.batch.ledger import database_time, nodes, runs, tables, transitions
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.incidents.tables import incidents, outbox
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import Rank, RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.nodes import ledger_poll
from batch_system.batch.nodes.outage import Outage
from batch_system.database.engine import Database
from tests.batch.ledger_world import NODE, rows


def one_channel(names: Sequence[str]) -> Sequence[str]:
    """A channel for all tasks, or those that a task names."""
    return list(names) or ["all"]


class Watching:
    """One node with a watch that does nothing between two calls of `turn`."""

    def __init__(
        self,
        ledger: Database,
        application: Database,
        thresholds: Thresholds | None = None,
        node: str | None = None,
    ) -> None:
        self.node = node or new_id()
        self.ledger = ledger
        self.watch = Watch(
            ledger,
            application,
            self.node,
            thresholds or Thresholds(),
            one_channel,
            lambda: None,
            Outage(),
        )

    async def register(self) -> None:
        row = {
            "id": self.node,
            "host": "here",
            "pid": 1,
            "version": "1",
            "draining": False,
            "tasks": [],
        }
        async with self.ledger.engine.begin() as connection:
            now = await database_time.now_of(connection)
            await nodes.register(
                connection, {**row, "started_at": now, "seen_at": now, "broken": []}
            )

    async def poll(self) -> bool:
        """Poll the ledger as the heartbeat does. Returns whether that has woken the watch."""
        async with self.ledger.reader.connect() as connection:
            self.watch.on_changes(await ledger_poll.read(connection, self.node))
        woken = self.watch._woken.is_set()
        self.watch._woken.clear()
        return woken

    async def turn(self, times: int = 1) -> None:
        """Poll the ledger, and do what the watch then does."""
        for _ in range(times):
            if await self.poll():
                await self.watch._turn()

    def later(self, seconds: float) -> datetime:
        """Move the clock while the service goes on, and return the time."""
        clock.advance(timedelta(seconds=seconds))
        self.watch._changes = None
        return clock.now()

    async def incidents(self, **equal: Any) -> list[dict[str, Any]]:
        return await rows(self.ledger, incidents, **equal)

    async def notes(self) -> list[tuple[str, str, str]]:
        """What is to be sent: the channel, the kind and the text, in the order of writing."""
        return [
            (row["channel"], row["kind"], row["content"]["text"])
            for row in await rows(self.ledger, outbox)
        ]


@asynccontextmanager
async def watching(
    ledger: Database, application: Database, **thresholds: float
) -> AsyncIterator[Watching]:
    """A node that has the duty of the watch."""
    node = Watching(ledger, application, Thresholds(**thresholds))
    await node.register()
    await node.turn(2)
    assert node.watch.holds
    yield node


async def started(
    ledger: Database, task: str, slot: datetime | None = None, **values: Any
) -> NewRun:
    """A run that a node is running now: of this slot, or by hand."""
    now = clock.now()
    if slot is not None:
        run = NewRun.scheduled(task, slot, now, catch_up=False, exclusive=None, priority=0)
    else:
        run = NewRun.queued(task, None, now, exclusive=None, priority=0)
    run.start(values.pop("node", NODE), now)
    run = replace(run, **values)
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [run])
    return run


async def ended(
    ledger: Database,
    run: NewRun,
    state: RunState = RunState.FAILED,
    fingerprint: str | None = "1:boom",
    reason: str | None = "ValueError: boom",
    error: dict[str, Any] | None = None,
) -> str:
    """The end of a running run, as its node writes it. Returns the id of the run."""
    now = clock.now()
    async with ledger.engine.begin() as connection:
        fence = (
            await connection.execute(select(tables.runs.c.fence).where(tables.runs.c.id == run.id))
        ).scalar_one()
        outcome = Outcome(
            id=run.id,
            fence=fence,
            state=state,
            outcome=state.value,
            number=1,
            node=NODE,
            task=run.task,
            started_at=now,
            ended_at=now,
            due_at=now if state == RunState.RETRYING else None,
            reason=None if state == RunState.SUCCEEDED and fingerprint is None else reason,
            error=error,
            fingerprint=fingerprint
            if state == RunState.FAILED or fingerprint in ("empty", "quarantine")
            else None,
        )
        assert await transitions.finish(connection, [outcome]) == []
    return run.id


async def failed(
    ledger: Database, task: str, slot: datetime | None = None, fingerprint: str = "1:boom", **v: Any
) -> str:
    """A run that has failed for good. Returns its id."""
    return await ended(ledger, await started(ledger, task, slot, **v), fingerprint=fingerprint)


async def succeeded(
    ledger: Database, task: str, slot: datetime | None = None, **values: Any
) -> str:
    """A run that has succeeded. Returns its id."""
    return await ended(
        ledger, await started(ledger, task, slot, **values), RunState.SUCCEEDED, fingerprint=None
    )


async def retried(ledger: Database, run: str, state: RunState, **outcome: Any) -> None:
    """A person retries this run, and it ends with this outcome."""
    async with ledger.engine.begin() as connection:
        assert await transitions.reopen(connection, [run], Rank.MANUAL, "ann", clock.now()) == {run}
    await claimed_and_ended(ledger, run, state, **outcome)


async def claimed_and_ended(ledger: Database, run: str, state: RunState, **outcome: Any) -> None:
    """A node takes this queued run, and it ends with this outcome."""
    async with ledger.engine.begin() as connection:
        (claimed,) = await transitions.claim(connection, [run], NODE, clock.now())
    now = clock.now()
    again = NewRun.queued(claimed.task, claimed.slot, now, exclusive=None, priority=0)
    await ended(ledger, replace(again, id=run), state, **outcome)


async def rename(ledger: Database, table: str, name: str) -> None:
    """Give a table another name, so that whoever reads it fails until it has its own name again."""
    async with ledger.engine.begin() as connection:
        await connection.execute(text(f"ALTER TABLE {table} RENAME TO {name}"))
