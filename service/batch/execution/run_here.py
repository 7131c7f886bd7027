"""A run that a person asked for, executed in the process that asked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.execution.local_engine import LocalEngine
from service.batch.ledger import database_time, runs, transitions
from service.batch.ledger.runs import Claimed, NewRun
from service.batch.ledger.states import FINAL, RunState
from service.batch.ledger.tables import new_id
from service.batch.queue import concurrency
from service.batch.tasks.parameters import SLOT
from service.batch.tasks.registry import Task
from service.database.engine import Database
from service.errors import InvalidParameters
from service.logs import get_logger

logger = get_logger("service.batch")

AGAIN_SECONDS = 0.5


def checked(task: Task, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a person gave for the parameters of `run()`, as the ledger stores it. Raises InvalidParameters."""
    if SLOT in given:
        raise InvalidParameters(f"parameter {SLOT}: it is the run's slot, so give it as --slot")
    return task.parameters.to_json(given) or None


class ManualRun:
    """One run of `task` on `node`. It is written as running at once, so no other node can claim it in between."""

    def __init__(self, database: Database, engine: LocalEngine, task: Task, node: str) -> None:
        self.id = new_id()
        self._database = database
        self._engine = engine
        self._task = task
        self._node = node

    async def execute(
        self, given: Mapping[str, Any], slot: datetime | None, requested_by: str | None
    ) -> dict[str, Any]:
        """Run it to its end, retries included; returns its row. Raises InvalidParameters before anything is written.

        Where another run of the task is active and overlap is not allowed, it waits for that one.
        """
        await self._start(checked(self._task, given), slot, requested_by)
        while True:
            await self._engine.until_over(self.id)
            row = await self._row()
            if row["state"] in FINAL or row["state"] == RunState.INTERRUPTED:
                return row
            await self._start_again(row)

    async def _start(self, params: dict[str, Any] | None, slot: datetime | None, by: str | None) -> None:
        told = False
        while True:
            try:
                async with self._engine.claiming:
                    async with self._database.engine.begin() as connection:
                        losses = self._engine.losses
                        new = self._new(params, slot, by, await database_time.now_of(connection))
                        new.lane = await self._lane(connection)
                        await runs.insert(connection, [new])
                    self._engine.launch([runs.claimed_from(new)], losses)
                return
            except IntegrityError:
                if not told:
                    logger.info(f"another run of {self._task.name} is active; waiting for its end")
                told = True
                await asyncio.sleep(AGAIN_SECONDS)

    def _new(self, params: dict[str, Any] | None, slot: datetime | None, by: str | None, now: datetime) -> NewRun:
        task = self._task
        new = NewRun.running(
            self._node,
            task.name,
            slot,
            now,
            exclusive=task.exclusive,
            priority=task.policies.priority,
            params=params,
            requested_by=by,
        )
        new.id = self.id
        return new

    async def _start_again(self, row: dict[str, Any]) -> None:
        """A retry, once it is due. A service that runs beside this process may take it; then there is nothing to do."""
        async with self._engine.claiming:
            async with self._database.engine.begin() as connection:
                losses = self._engine.losses
                now = await database_time.now_of(connection)
                is_due = row["state"] == RunState.RETRYING and row["due_at"] <= now
                claimed = await self._claim(connection, now) if is_due else []
            self._engine.launch(claimed, losses)
        if not claimed:
            left = (row["due_at"] - now).total_seconds()
            await asyncio.sleep(min(AGAIN_SECONDS, left) if left > 0 else AGAIN_SECONDS)

    async def _claim(self, connection: AsyncConnection, now: datetime) -> list[Claimed]:
        """None when another run of the task is running."""
        try:
            async with connection.begin_nested():
                taken = {self.id: await self._lane(connection)}
                return await transitions.claim(connection, [self.id], self._node, now, taken)
        except IntegrityError:
            return []

    async def _lane(self, connection: AsyncConnection) -> int:
        """One that is empty; or one that is not, which the database refuses."""
        name, number = self._task.exclusive, self._task.lanes
        if name is None or number == 1:
            return 1
        empty = (await concurrency.free(connection, {name: number}))[name]
        return empty[0] if empty else 1

    async def _row(self) -> dict[str, Any]:
        async with self._database.reader.connect() as connection:
            row = await runs.get(connection, self.id)
            assert row is not None
            return row
