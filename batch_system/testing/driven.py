"""A service without background work: it handles due slots and runs only when a test moves its clock
and calls it.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from functools import partial
from types import TracebackType
from typing import Any, Self

from sqlalchemy import func, select, text

from batch_system import clock, logs
from batch_system.batch.context import fencing
from batch_system.batch.cron.cron import Schedule
from batch_system.batch.execution.outcomes import progress_of
from batch_system.batch.firing import task_sync
from batch_system.batch.firing.firing import fire
from batch_system.batch.firing.handover import hand_over
from batch_system.batch.firing.limit_functions import LimitFunctions
from batch_system.batch.firing.waiting import open_and_close
from batch_system.batch.ledger import attempts, database_time, nodes, rates, runs, tables
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.states import FINAL, RunState
from batch_system.batch.ledger.tables import CLAIMABLE_SQL, WAITING_SQL, new_id
from batch_system.batch.nodes.orphans import rescue
from batch_system.batch.nodes.outage import Outage
from batch_system.batch.queue import enqueue
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from batch_system.database.session import leave_application_database, use_application_database
from batch_system.errors import BatchError
from batch_system.operations.asking.actor import Actor
from batch_system.operations.asking.context import Loaded
from batch_system.operations.here import use_no_operations, use_operations
from batch_system.operations.operations import Operations
from batch_system.settings.reading import get_settings
from batch_system.testing.engine import DrivenEngine
from batch_system.testing.instances import Prepare, prepared
from batch_system.testing.kills import Kill
from batch_system.testing.recorder import Recorder
from batch_system.versions import package_version


class DrivenService:
    """A service on the event loop that enters it, for the time of a block: `async with
    DrivenService(…) as service`.

    Attributes:
      node: The id of its node.
      operations: The operations of the service. They record `test` as the actor.
      is_dead: Whether it was killed. The runs that were active then stay `running` in the ledger.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        firing: set[str] | None,
        prepare: Sequence[Prepare],
        recorder: Recorder,
        patience: float,
    ) -> None:
        """`firing`: the names of the tasks that fire; None for all. `prepare`: called with the
        instance of each attempt. `patience`: see `Batch`.
        """
        self._tasks = tasks
        self._prepare = prepare
        self._recorder = recorder
        self._schedules = _schedules_of(tasks, firing)
        self._patience = patience
        self.node = new_id()
        self.is_dead = self._has_failed_part = False

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            settings = get_settings()
            self._ledger = Database(
                settings.ledger_url, setting=settings.ledger_setting, pool_size=5
            )
            stack.push_async_callback(self._ledger.dispose)
            self._keep = timedelta(days=settings.KEEP_RUNS_DAYS)
            shows_values = settings.BATCH_SHOW_SQL_PARAMETERS
            self._application = application = Database(
                settings.DATABASE_URL,
                setting="DATABASE_URL",
                pool_size=5,
                shows_values=shows_values,
            )
            stack.push_async_callback(application.dispose)
            use_application_database(
                application, partial(fencing.guard, idle_seconds=settings.LEASE_SECONDS)
            )
            stack.callback(leave_application_database, application)
            stack.enter_context(logs.keep_run_lines())
            tasks = dict(self._tasks)
            for prepare in (*self._prepare, self._recorder.prepare):
                tasks = prepared(tasks, prepare)
            pools = {task.pool for task in tasks.values()}
            self._engine = DrivenEngine(
                self._ledger, tasks, self.node, pools=pools, on_ended=self._on_ended
            )
            stack.push_async_callback(self._end)
            self._limit_functions = LimitFunctions(self._ledger, tasks, lambda: None, Outage())
            stack.callback(self._limit_functions.close)
            self.operations = Operations(
                self._ledger,
                application,
                lambda: Loaded(self._tasks),
                settings,
                actor=Actor("test", source="service"),
                wake=self._engine.wake,
                node=self.node,
                are_ready=True,
            )
            use_operations(self.operations)
            stack.callback(use_no_operations)
            enqueue.use_service(self._ledger, self._engine.wake)
            stack.callback(enqueue.use_no_service)
            async with self._ledger.engine.begin() as connection:
                await task_sync.record_tasks(connection, self._tasks, clock.now())
                await task_sync.set_schedules(connection, self._schedules, self._tasks, self.node)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def advance(self, until: datetime) -> None:
        """Move the clock to `until` in steps, and handle everything that is due at each step's
        instant.
        """
        await self.settle()
        while (at := await self._next_instant()) is not None and at <= until:
            clock.advance(at - clock.now())
            await self.settle()
        clock.advance(until - clock.now())

    async def jump(self, until: datetime) -> None:
        """Move the clock to `until` in one step, as if no service had run in between, and then
        handle everything that is due.
        """
        clock.advance(until - clock.now())
        await self.settle()

    async def finish(self, run_id: str) -> None:
        """Execute this run until it is in a final state or was killed. The clock moves to each
        retry.
        """
        await self._run_what_is_due()
        while not self.is_dead and (row := await self._row(run_id))["state"] not in FINAL:
            due_at = (
                row["due_at"]
                if row["due_at"] > clock.now()
                else await self._next_part_at(run_id) or await self._next_place_at()
            )
            if due_at is None:
                raise BatchError(
                    f"run {run_id} of task {row['task']} can't go on: it is {row['state']}"
                )
            clock.advance(due_at - clock.now())
            await self._run_what_is_due()

    async def kill(self, run_id: str, after_chunk: int | None, after_part: int | None) -> Kill:
        """Execute this run until it has committed this many chunks, or this many of its parts have
        succeeded.

        It is killed then, unless it ends before.
        """
        with self._recorder.killing(run_id, after_chunk, after_part, self._stop_driving) as kill:
            await self.finish(run_id)
        return kill

    async def rescue(self, node: str) -> None:
        """Interrupt the runs that were active on `node` when it was killed, so that this service
        resumes them.
        """
        async with self._ledger.engine.begin() as connection:
            now = await database_time.now_of(connection)
            process = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "version": package_version(),
            }
            seen = {
                "started_at": now,
                "seen_at": now,
                "draining": False,
                "tasks": sorted(self._tasks),
            }
            await nodes.register(connection, {"id": node, **process, **seen})
            await rescue(connection, {node: 0}, now)

    async def settle(self) -> None:
        """Fire every due slot and execute every run that can start, until nothing more is due at
        this instant.
        """
        names = {name for name, schedule in self._schedules.items() if schedule is not None}
        while names:
            async with self._engine.claiming:
                async with self._ledger.engine.begin() as connection:
                    fired = await fire(
                        connection,
                        names,
                        self._tasks,
                        self.node,
                        self._engine.capacity,
                        clock.now(),
                    )
                self._engine.launch(fired.claimed)
            await self._run_what_is_due()
            names = {name for name, at in fired.again_at.items() if at <= clock.now()}
        await self._run_what_is_due()

    async def _run_what_is_due(self) -> None:
        try:
            async with asyncio.timeout(self._patience) as self._timeout:
                is_more = True
                while is_more:
                    await self._limit_functions.look()
                    await self._engine.settle(self._stop_other_parts)
                    is_more = await self._hand_over() or await self._open()
        except TimeoutError:
            if self._recorder.kill is not None and self._recorder.kill.is_done:
                await self._die(self._recorder.kill)
                return
            names = ", ".join(sorted({attempt.task.name for attempt in self._engine.attempts}))
            raise TimeoutError(
                f"still running after batch.patience, which is {self._patience:g} s: {names}"
            ) from None

    def _on_ended(self, outcomes: Sequence[Outcome]) -> None:
        self._has_failed_part |= any(
            each.part is not None and each.state == RunState.FAILED for each in outcomes
        )
        self._recorder.ended(outcomes)

    async def _stop_other_parts(self) -> None:
        """With `fail_fast`, the failure of a part cancels the others at once."""
        if self._has_failed_part:
            self._has_failed_part = False
            await self._open()

    async def _open(self) -> bool:
        """Open and close the waiting runs that are ready. Returns whether there were any."""
        async with self._ledger.engine.begin() as connection:
            return (await open_and_close(connection, self._tasks, clock.now())).number > 0

    async def _hand_over(self) -> bool:
        """Hand over starts that were committed with the application's data. Returns whether there
        were any.
        """
        return await hand_over(self._application, self._ledger, self._keep) is not None

    def _stop_driving(self) -> None:
        """End the wait for the active runs at once, by setting its timeout to a past instant."""
        if not self._timeout.expired():
            self._timeout.reschedule(0)

    async def _die(self, kill: Kill) -> None:
        """Give up all attempts, as if this process had died: their progress is written to the
        ledger, but no outcome.

        A real service has written the progress up to half a second before it dies. At the fifth
        loss of its node, a run without progress fails. The speed of the test must not decide that,
        so the progress is written now.
        """
        self.is_dead = True
        async with self._ledger.engine.begin() as connection:
            await attempts.write_progress(connection, progress_of(self._engine.attempts))
        for attempt in self._engine.attempts:
            attempt.give_up(f"the test killed it after {kill.counted}")
        kill.end_frozen_tasks()

    async def _next_instant(self) -> datetime | None:
        """The next instant at which a slot or a run is due, or a run has waited long enough."""
        instants = [
            schedule.next(clock.now())
            for schedule in self._schedules.values()
            if schedule is not None
        ]
        async with self._ledger.reader.connect() as connection:
            due_at, wait_until = tables.runs.c.due_at, tables.runs.c.wait_until
            for at, condition in (
                (due_at, CLAIMABLE_SQL),
                (due_at, WAITING_SQL),
                (wait_until, WAITING_SQL),
            ):
                query = select(func.min(at)).where(text(condition), at > clock.now())
                instants.append((await connection.execute(query)).scalar())
        instants.append(await self._next_place_at())
        return min((at for at in instants if at is not None), default=None)

    async def _next_part_at(self, run_id: str) -> datetime | None:
        """The instant at which the next part of a run is tried again; None if no part is."""
        query = select(func.min(tables.runs.c.due_at)).where(
            tables.runs.c.awaited_by == run_id,
            text(CLAIMABLE_SQL),
            tables.runs.c.due_at > clock.now(),
        )
        async with self._ledger.reader.connect() as connection:
            at: datetime | None = (await connection.execute(query)).scalar()
        return at

    async def _next_place_at(self) -> datetime | None:
        """The next instant at which a rate lets another run begin."""
        async with self._ledger.reader.connect() as connection:
            return await rates.next_free(connection, clock.now())

    async def _row(self, run_id: str) -> dict[str, Any]:
        async with self._ledger.reader.connect() as connection:
            row = await runs.get(connection, run_id)
        assert row is not None
        return row

    async def _end(self) -> None:
        """Stop the engine. If an error has ended the test's call, runs are still active; they are
        interrupted.
        """
        self._engine.start()
        if not self.is_dead:
            await self._engine.drain(0)
        await self._engine.stop()


def _schedules_of(tasks: Mapping[str, Task], firing: set[str] | None) -> dict[str, Schedule | None]:
    """The schedules of the tasks that fire. A follower has the schedule of the task that it
    follows, if that fires.
    """
    read = {
        name: task.read_schedule()
        for name, task in tasks.items()
        if firing is None or name in firing
    }

    def leader_of(name: str) -> str:
        follows = tasks[name].follows if name in tasks and name in read else None
        return name if follows is None else leader_of(follows)

    return {name: read.get(leader_of(name)) if name in read else None for name in tasks}
