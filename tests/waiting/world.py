"""A ledger with tasks that wait for each other: its slots are fired, its runs end, and what waits
is opened.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from batch_system import clock
from batch_system.batch.firing.waiting import open_and_close
from batch_system.batch.ledger import transitions
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.states import RunState
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from tests.batch.ledger_world import NODE, fire, know, rows

START = datetime(2026, 3, 10, 0, 30, tzinfo=UTC)
DAY = timedelta(days=1)
MINUTE = timedelta(minutes=1)


class Waits:
    """`now`: the time, which is moved by the tests."""

    def __init__(self, ledger: Database) -> None:
        self.ledger = ledger
        self.tasks: dict[str, Task] = {}

    async def know(self, *tasks: Task) -> None:
        self.tasks |= await know(self.ledger, *tasks)

    async def fire(self, at: datetime, room: int = 0) -> None:
        clock.advance(at - clock.now())
        await fire(self.ledger, self.tasks, at, Capacity(room, room))

    async def look(self, tasks: dict[str, Task] | None = None) -> int:
        """Open and close what is ready. Returns how many runs were."""
        async with self.ledger.engine.begin() as connection:
            loaded = self.tasks if tasks is None else tasks
            return (await open_and_close(connection, loaded, clock.now())).number

    async def run_of(self, task: str, slot: datetime | None = None, **equal: Any) -> dict[str, Any]:
        """The row of the only run of a task, or of a slot of it."""
        given = {"task": task, **equal} | ({"slot": slot} if slot is not None else {})
        (row,) = await rows(self.ledger, **given)
        return row

    async def state(self, task: str, slot: datetime | None = None) -> str:
        """The state of the only run of a task, or of a slot of it."""
        return str((await self.run_of(task, slot))["state"])

    async def start(self, run: str) -> None:
        async with self.ledger.engine.begin() as connection:
            assert await transitions.claim(connection, [run], NODE, clock.now())

    async def end(
        self, task: str, slot: datetime | None = None, state: RunState = RunState.SUCCEEDED
    ) -> None:
        """Have the run of a task start and end."""
        run = await self.run_of(task, slot)
        await self.start(run["id"])
        await self.finish(run["id"], state)

    async def finish(self, run: str, state: RunState = RunState.SUCCEEDED, **values: Any) -> None:
        """Have a running run end."""
        (row,) = await rows(self.ledger, id=run)
        now = clock.now()
        ended = Outcome(
            run,
            row["fence"],
            state,
            str(state),
            row["attempt"],
            NODE,
            row["task"],
            now,
            now,
            **values,
        )
        async with self.ledger.engine.begin() as connection:
            assert await transitions.finish(connection, [ended]) == []
