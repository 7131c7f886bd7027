"""Attempts outside of any engine: started on the test's loop, with their endings."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime
from typing import Any

from batch_system import BaseTask, TaskRegistry
from batch_system.batch.execution.attempt import Attempt
from batch_system.batch.execution.ending import Ending
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.states import Origin
from batch_system.concurrency.thread_pool import ThreadPool

SECONDS = 5.0
SLOT = datetime(2026, 11, 25, 2, 0, tzinfo=UTC)


class Quick(BaseTask):
    name = "quick"
    schedule = None

    def run(self) -> Any: ...


def made(run: Any, **attributes: Any) -> type[BaseTask]:
    return TaskRegistry.register(
        type("Made", (Quick,), {"__module__": __name__, "run": run, **attributes})
    )


class Begun:
    """An attempt that was started, its run, and its ending."""

    def __init__(
        self,
        run: Any,
        number: int = 1,
        params: dict[str, Any] | None = None,
        id: str = "run-1",
        **attributes: Any,
    ) -> None:
        task = TaskRegistry.get(made(run, **attributes)().name)
        claimed = Claimed(id, task.name, SLOT, Origin.SCHEDULE, params, number, 1, SLOT, SLOT)
        self.ended: list[Ending] = []
        self._over = asyncio.Event()
        self.attempt = Attempt(claimed, task, ThreadPool(2), self._on_end)
        self.run = self.attempt.run
        self.attempt.start()

    def _on_end(self, _: Attempt, ending: Ending) -> None:
        self.ended.append(ending)
        self._over.set()

    async def ending(self) -> Ending:
        await asyncio.wait_for(self._over.wait(), SECONDS)
        await asyncio.sleep(0)
        [ending] = self.ended
        return ending


async def until_in_its_thread(has_begun: threading.Event) -> None:
    """Hold the event loop until a sync body that was just started has begun, so that its timeout
    comes after that.
    """
    await asyncio.sleep(0)  # the attempt hands its body to a thread
    assert has_begun.wait(SECONDS)


async def ending_of(run: Any, **more: Any) -> Ending:
    return await Begun(run, **more).ending()
