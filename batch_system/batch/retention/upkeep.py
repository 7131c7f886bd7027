"""Upkeep: once an hour, a running service prunes the ledger and fails the runs that no node would
execute.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from sqlalchemy.exc import DBAPIError

from batch_system import clock
from batch_system.batch.queue import left_queues
from batch_system.batch.queue.unserved import (
    REASON,
    REASON_OF_PARTS,
    fail_left_parts,
    fail_unserved,
)
from batch_system.batch.retention.pruning import Pruner
from batch_system.batch.tasks.registry import Task
from batch_system.concurrency.background import Background
from batch_system.database import troubles
from batch_system.database.engine import Database
from batch_system.errors import DatabaseError
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

FIRST_SECONDS = 600.0
"""The wait between the start of the service, which has other work then, and the first upkeep."""

EVERY_SECONDS = 3600.0
REJOIN_SECONDS = 60.0
"""How often runs are looked for whose task has got a limit, or has lost it."""


class Upkeep(Background):
    turn_seconds = 600.0  # it works in batches, and continues after an interruption

    def __init__(
        self,
        ledger: Database,
        tasks: Mapping[str, Task],
        pruner: Pruner,
        first: float = FIRST_SECONDS,
    ) -> None:
        """`tasks`: those of this service, by name."""
        self._ledger = ledger
        self._tasks = tasks
        self._pruner = pruner
        self._first = first

    async def _loop(self) -> None:
        due_at = clock.monotonic() + self._first
        while True:
            await asyncio.sleep(min(REJOIN_SECONDS, max(0.0, due_at - clock.monotonic())))
            await self._turn(self._rejoin, "in a minute")
            if clock.monotonic() >= due_at:
                due_at = clock.monotonic() + EVERY_SECONDS
                await self._turn(self._fail_and_prune, "in an hour")

    async def _turn(self, work: Callable[[], Awaitable[None]], again: str) -> None:
        try:
            async with self.limited_turn():
                await work()
        except (DBAPIError, DatabaseError, OSError) as error:
            cause = troubles.cause_of(error, self._ledger.kind)
            logger.warning(f"the upkeep stopped, the next one is {again}: {cause}")
        except Exception:  # the background loop's boundary
            logger.exception("the upkeep failed")

    async def _rejoin(self) -> None:
        moved: Counter[str] = Counter()
        while some := await left_queues.rejoin(self._ledger, self._tasks):
            moved += some
        for task, number in moved.items():
            logger.info(
                f"{number:,} waiting runs of task {task}, whose limit has changed, joined its "
                "present queues"
            )

    async def _fail_and_prune(self) -> None:
        for task, number in (await fail_unserved(self._ledger)).items():
            logger.error(f"{number:,} runs of task {task} have failed: {REASON}")
        for task, number in (await fail_left_parts(self._ledger, self._tasks)).items():
            logger.error(f"{number:,} parts of runs of task {task} have failed: {REASON_OF_PARTS}")
        deleted = +await self._pruner.prune()
        if deleted:
            logger.info(
                "pruned " + ", ".join(f"{number:,} {name}" for name, number in deleted.items())
            )
