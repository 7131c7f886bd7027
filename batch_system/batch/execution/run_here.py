"""Executes a run in the process of the command that asked for it."""

from __future__ import annotations

import asyncio
from asyncio import FIRST_COMPLETED
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.execution.engine import LocalEngine
from batch_system.batch.ledger import database_time, parts, runs, transitions
from batch_system.batch.ledger.runs import Claimed, NewRun
from batch_system.batch.ledger.states import FINAL, Rank, RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.queue import concurrency, gates, turns
from batch_system.batch.tasks.parameters import SLOT
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from batch_system.errors import InvalidParameters
from batch_system.logs import get_logger
from batch_system.settings.pools import DEFAULT_POOL, Pool

logger = get_logger("batch_system.batch")

RETRY_SECONDS = 0.5
"""The wait between two tries to start a run whose task is active elsewhere."""


def checked_parameters(task: Task, parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """The parameters of `run()` that a person has given, as the ledger stores them.

    Raises InvalidParameters.
    """
    if SLOT in parameters:
        raise InvalidParameters(f"parameter {SLOT}: it is the run's slot, so give it as --slot")
    return task.parameters.to_json(parameters) or None


def refuse_other_pools(task: Task, pools: Mapping[str, Pool]) -> None:
    """Refuse a task whose runs only other processes execute. `pools`: what serves each pool, by the
    settings.

    Raises InvalidParameters.
    """
    described = pools.get(task.pool)
    if task.pool != DEFAULT_POOL and (described is None or described.kind != "process"):
        elsewhere = described.words if described is not None and described.is_placed else ""
        raise InvalidParameters(
            f"task {task.name} is of the pool {task.pool}, whose runs only "
            f"{elsewhere or f'`batch work --pool {task.pool}`'} executes: use `batch run "
            f"{task.name} --queue`"
        )


class _NotYet(Exception):
    """No further run of the task may begin now. Its text says why, and what has to happen."""


class ManualRun:
    """One run of `task` on the node with the id `node`. It is inserted as running, so no other node
    can claim it.
    """

    def __init__(self, database: Database, engine: LocalEngine, task: Task, node: str) -> None:
        self.id = new_id()
        self._database = database
        self._engine = engine
        self._task = task
        self._node = node

    async def execute(
        self, parameters: Mapping[str, Any], slot: datetime | None, requested_by: str | None
    ) -> dict[str, Any]:
        """Execute the run to its end, retries included, and return its row by column name.

        If another run of the task is active and the task may not overlap, it first waits for that
        run to end. Raises InvalidParameters before anything is written.
        """
        await self._start(checked_parameters(self._task, parameters), slot, requested_by)
        while True:
            await self._engine.until_written(self.id)
            row = await self._row()
            if row["state"] in FINAL or row["state"] == RunState.INTERRUPTED:
                return row
            if row["state"] == RunState.WAITING:
                await self._do_parts()
            else:
                await self._start_again(row)

    async def _start(
        self, params: dict[str, Any] | None, slot: datetime | None, by: str | None
    ) -> None:
        has_logged = False
        while True:
            try:
                async with self._engine.claiming:
                    async with self._database.engine.begin() as connection:
                        losses = self._engine.losses
                        now = await database_time.now_of(connection)
                        new_run = self._new_run(params, slot, by, now)
                        new_run.lane = await self._lane(connection, new_run.exclusive)
                        await runs.insert(connection, [new_run])
                        await self._take_place(connection, new_run.exclusive, now)
                    self._engine.launch([runs.claimed_from(new_run)], losses)
                return
            except (IntegrityError, _NotYet) as error:
                if not has_logged:
                    logger.info(
                        f"another run of {self._task.name} is active; waiting for its end"
                        if isinstance(error, IntegrityError)
                        else str(error)
                    )
                has_logged = True
                await asyncio.sleep(RETRY_SECONDS)

    def _new_run(
        self, params: dict[str, Any] | None, slot: datetime | None, by: str | None, now: datetime
    ) -> NewRun:
        task = self._task
        new_run = NewRun.running(
            self._node,
            task.name,
            slot,
            now,
            exclusive=task.queueing.of(params),
            priority=task.policies.priority,
            params=params,
            requested_by=by,
        )
        new_run.id = self.id
        return new_run

    async def _do_parts(self) -> None:
        """Execute parts of the run until one ends; services may execute others meanwhile. Opens the
        run once all have ended.
        """
        queue, partition = self._task.queue_of_parts, self._task.partition
        assert partition is not None
        async with self._engine.claiming:
            async with self._database.engine.begin() as connection:
                losses, now = self._engine.losses, await database_time.now_of(connection)
                await gates.apply(
                    connection, await gates.decide(connection, now, only=self.id), now
                )
                lanes = (await concurrency.free(connection, {queue: partition.parallel}))[queue]
                ids = (
                    await parts.startable_ids(connection, self.id, now, len(lanes)) if lanes else []
                )
                claimed = await self._claim_in_lanes(
                    connection, dict(zip(ids, lanes, strict=False)), now
                )
            self._engine.launch(claimed, losses)
        ends = [
            asyncio.ensure_future(self._engine.until_written(each.claimed.id))
            for each in self._engine.attempts
        ]
        await asyncio.wait(
            ends or [asyncio.ensure_future(asyncio.sleep(RETRY_SECONDS))],
            return_when=FIRST_COMPLETED,
        )
        for end in ends:
            end.cancel()

    async def _start_again(self, row: dict[str, Any]) -> None:
        """Start the retry or the join of the run if it is due, otherwise wait a little. A service
        may start it first.
        """
        async with self._engine.claiming:
            async with self._database.engine.begin() as connection:
                losses = self._engine.losses
                now = await database_time.now_of(connection)
                is_due = (
                    row["state"] in (RunState.RETRYING, RunState.QUEUED) and row["due_at"] <= now
                )
                claimed = await self._claim(connection, row, now) if is_due else []
            self._engine.launch(claimed, losses)
        if not claimed:
            seconds_left = (row["due_at"] - now).total_seconds()
            await asyncio.sleep(
                min(RETRY_SECONDS, seconds_left) if seconds_left > 0 else RETRY_SECONDS
            )

    async def _claim(
        self, connection: AsyncConnection, row: dict[str, Any], now: datetime
    ) -> list[Claimed]:
        """Claim the run. Returns an empty list if another run of the task is running, a service was
        first, or the limit or the rate of the task is reached.
        """
        has_lane = row["rank"] == Rank.JOINING
        try:
            async with connection.begin_nested() as savepoint:
                lane = 1 if has_lane else await self._lane(connection, row["exclusive"])
                if row["state"] == RunState.RETRYING:
                    await self._take_place(connection, row["exclusive"], now)
                claimed = await self._claim_in_lanes(connection, {self.id: lane}, now)
                if not claimed:
                    await savepoint.rollback()
                return claimed
        except _NotYet:
            return []

    async def _take_place(
        self, connection: AsyncConnection, queue: str | None, now: datetime
    ) -> None:
        if not await turns.take_place(connection, self._task.queueing, queue, now):
            raise _NotYet(f"the rate of {self._task.name} is reached; waiting for its period")

    async def _claim_in_lanes(
        self, connection: AsyncConnection, lanes: Mapping[str, int], now: datetime
    ) -> list[Claimed]:
        try:
            async with connection.begin_nested():
                return await transitions.claim(connection, list(lanes), self._node, now, lanes)
        except IntegrityError:
            return []

    async def _lane(self, connection: AsyncConnection, name: str | None) -> int:
        """The number of a free lane of this queue. If none is free, it is 1, and the database then
        refuses the run; with a limit, it raises _NotYet.
        """
        if name is not None and self._task.queueing.limit is not None:
            lane = await turns.free_lane(connection, self._task.queueing, name)
            if lane is None:
                raise _NotYet(f"the limit of {self._task.name} is reached; waiting for a run's end")
            return lane
        number = self._task.lanes
        if name is None or number == 1:
            return 1
        free_lanes = (await concurrency.free(connection, {name: number}))[name]
        return free_lanes[0] if free_lanes else 1

    async def _row(self) -> dict[str, Any]:
        async with self._database.reader.connect() as connection:
            row = await runs.get(connection, self.id)
            assert row is not None
            return row
