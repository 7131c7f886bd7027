"""The class of the fixture `batch`, which runs tasks on real databases, with a clock that the test
moves.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from batch_system import clock
from batch_system.batch.ledger.states import FINAL
from batch_system.batch.tasks import followers
from batch_system.batch.tasks.base import BaseTask
from batch_system.batch.tasks.discovery import load_tasks
from batch_system.batch.tasks.registry import Task, TaskRegistry
from batch_system.errors import BatchError, InvalidParameters, UnknownRun, UnknownTask
from batch_system.operations.asking.results import Quarantined
from batch_system.operations.runs import quarantine
from batch_system.settings.reading import get_settings
from batch_system.settings.urls import async_url
from batch_system.testing.calendars import Calendars, Dates
from batch_system.testing.driven import DrivenService
from batch_system.testing.instances import Failures, Given, MadeUpstreams
from batch_system.testing.kills import check_number
from batch_system.testing.recorder import Recorder
from batch_system.testing.records import CommittedChunk as CommittedChunk
from batch_system.testing.records import (
    MissedRange,
    RunRecord,
    ended_ids,
    missed_ranges,
    run_records,
)
from batch_system.verbs.run_changes import CancelRun, RedriveRun, RetryRun, StartRun
from batch_system.verbs.tasks import PauseTask, ResumeTask

START = datetime(2026, 1, 1, tzinfo=UTC)
PATIENCE = 30.0

TaskOrName = type[BaseTask] | str
RunOrTask = RunRecord | TaskOrName
"""A returned run, the id of a run, or a task, which stands for its newest run."""


class Batch:
    """Runs the tasks of TASKS_DIR. The clock stands still, and only calls of this object move it.

    Attributes:
      patience: Seconds of real time that the runs of one call may take. After that the call
          raises TimeoutError.
    """

    def __init__(self, root: Path, calendars: Calendars) -> None:
        """`root`: the folder to which TASKS_DIR is relative, if it is not found from the current
        folder.
        """
        self._calendars = calendars
        self.patience = PATIENCE
        self._failures = Failures()
        self._recorder = Recorder()
        self._upstreams = MadeUpstreams()
        self._killed: tuple[str, str] | None = None
        """The id of the run that was killed and waits for `resume`, and the id of its node."""
        self._only: set[str] | None = None
        self._is_busy = False
        self._root = root
        self._load()

    def _load(self) -> None:
        """Load the tasks in TASKS_DIR."""
        folder = get_settings().TASKS_DIR
        if not folder.is_dir() and (self._root / folder).is_dir():
            folder = self._root / folder
        has_no_folder = "TASKS_DIR" not in get_settings().model_fields_set and not folder.is_dir()
        self._broken = [] if has_no_folder else load_tasks(folder)

    @property
    def database_url(self) -> str:
        """The URL of the application's database of this test, with an asynchronous driver."""
        return async_url(get_settings().DATABASE_URL)

    @property
    def now(self) -> datetime:
        """The current instant of the clock: aware, in UTC."""
        return clock.now()

    def set_time(self, at: datetime) -> None:
        """Set the clock to `at` (aware), forward or back. Raises BatchError after the first run or
        missed slot.
        """
        if at.utcoffset() is None:
            raise ValueError(f"set_time() was given {at!r}; allowed: an aware datetime")
        if self.runs() or self.missed():
            raise BatchError(
                "set_time() works only before the first run or missed slot; later, call advance()"
            )
        clock.advance(at - clock.now())

    def add(self, *tasks: type[BaseTask]) -> None:
        """Register tasks that are not in TASKS_DIR. Their slots fire from now on. Raises
        InvalidTask.
        """
        for task in tasks:
            TaskRegistry.of(task)

    def calendar(self, name: str, dates: Dates, weekend: Sequence[str] | None = None) -> None:
        """Let `Calendar(name)` have these dates in this test, instead of those of its file.

        `dates`: dates such as "2026-12-24", or a mapping of dates to names. `weekend`: days such as
        "SAT". Given again, it is a change of schedule of its tasks. Raises InvalidTask.
        """
        self._calendars.give(name, dates, weekend)
        if self._broken:  # the calendar may be what a file lacked
            self._load()

    def only(self, *tasks: TaskOrName) -> None:
        """Fire only the slots of these tasks. Other tasks can still be run with `run`."""
        self._only = {self._known(task).name for task in tasks}

    def fail_next(
        self,
        task: TaskOrName,
        error: BaseException | None = None,
        times: int = 1,
        part: int | None = None,
    ) -> None:
        """Make the next attempts of `task`, or of its `part`, raise `error` (by default a
        RuntimeError).
        """
        if error is not None and not isinstance(error, BaseException):
            raise TypeError(
                f"fail_next() was given {error!r}; allowed: an exception, such as OSError('no "
                "network')"
            )
        self._failures.add(
            self._known(task).name,
            error or RuntimeError("made to fail by fail_next()"),
            times,
            part,
        )

    async def run(
        self,
        task: TaskOrName,
        *,
        slot: datetime | None = None,
        kill_after_chunk: int | None = None,
        kill_after_part: int | None = None,
        upstream: Given | None = None,
        **params: Any,
    ) -> RunRecord:
        """Run `task` with the parameters `params` to its end. If the run is retried, the clock
        moves to each retry.

        Runs that it starts with `start()` are executed in the same call, unless they begin later
        (`at`, `delay`). `upstream`: the value for its parameter with the annotation Upstream: the
        results by the names of the tasks that it waits for, or for a follow-up a list with the
        results of the members of its group. `kill_after_chunk`: when the run has committed this
        many chunks, in all its loops together, it is killed, as if its process had died. It is
        returned in the state `running`, and `resume()` continues it. Raises AssertionError if the
        run ends with fewer chunks. `kill_after_part`: the same when this many parts of a
        partitioned task have succeeded. It is returned in the state `waiting`. A failed run is also
        returned: see its `state`, `reason` and `error`. Raises InvalidParameters, InvalidTask.
        """
        known = self._known(task)
        check_number(kill_after_chunk)
        check_number(kill_after_part, "kill_after_part")
        if upstream is not None and not known.parameters.takes_upstream:
            if "upstream" not in known.parameters.names:
                raise InvalidParameters(
                    f"run() of task {known.name} has no parameter with the annotation Upstream"
                )
            params, upstream = {**params, "upstream": upstream}, None
        if (kill_after_chunk or kill_after_part) and self._killed is not None:
            raise BatchError(
                f"run {self._killed[0]} was killed before; call `batch.resume()` before another "
                "run can be killed"
            )
        async with self._service() as service:
            started = await service.operations(
                StartRun(name=known.name, parameters=params, slot=slot)
            )
            if upstream is not None:
                self._upstreams.give(started.id, upstream)
            await self._finish(service, started.id, kill_after_chunk, kill_after_part)
        return self._record(started.id)

    async def start(self, task: TaskOrName, **params: Any) -> RunRecord:
        """Queue a run of `task`. The next `settle()` or `advance()` begins it if its limit and its
        rate allow it. Raises InvalidParameters, TooManyWaiting, InvalidTask.
        """
        known = self._known(task)
        async with self._service() as service:
            started = await service.operations(StartRun(name=known.name, parameters=params))
        return self._record(started.id)

    async def retry(self, run: RunOrTask, *, from_the_beginning: bool = False) -> RunRecord:
        """Give a run in a final state a new attempt, like `batch retry`, and run it to its end.

        Raises WrongState if the run has not ended, or if it has succeeded and `from_the_beginning`
        is False.
        """
        async with self._service() as service:
            retried = await service.operations(
                RetryRun(run=self._id(run), from_the_beginning=from_the_beginning)
            )
            await self._finish(service, retried.id, None)
        return self._record(retried.id)

    async def cancel(self, run: RunOrTask) -> RunRecord:
        """Cancel a waiting run, like `batch cancel`. Raises WrongState if the run has ended."""
        async with self._service() as service:
            cancelled = await service.operations(CancelRun(run=self._id(run)))
        return self._record(cancelled.id)

    async def quarantine(self, run: RunOrTask) -> Sequence[Quarantined]:
        """The items that a run has set aside: `item`, `error`, `times`, `redriven_by`."""
        async with self._service() as service:
            return await quarantine.list_items(service.operations.context, self._id(run))

    async def redrive(self, run: RunOrTask, items: Sequence[str] | None = None) -> RunRecord:
        """Process the items that a run has set aside once more, in a new run, and return the new
        run when it has ended.

        `items`: only these, as `quarantine` returns them. Raises WrongState if none of them is in
        quarantine any more.
        """
        async with self._service() as service:
            started = await service.operations(
                RedriveRun(run=self._id(run), items=list(items) if items is not None else None)
            )
            await self._finish(service, started.id, None)
        return self._record(started.id)

    async def pause(self, task: TaskOrName) -> None:
        """Stop firing a task, like `batch pause`. Slots that come due before `unpause` are
        missed.
        """
        name = self._known(task).name
        async with self._service() as service:
            await service.operations(PauseTask(name=name))

    async def unpause(self, task: TaskOrName) -> None:
        """Fire a paused task again, like `batch resume`."""
        name = self._known(task).name
        async with self._service() as service:
            await service.operations(ResumeTask(name=name))

    async def resume(self, *, kill_after_chunk: int | None = None) -> RunRecord:
        """Take over the run that a kill has ended, as another process would, and run it to its end.

        It continues after its last committed chunk, in the same attempt. `kill_after_chunk` kills
        it once more; only chunks that are committed from now on count. Raises BatchError if no run
        was killed.
        """
        check_number(kill_after_chunk)
        if self._killed is None:
            raise BatchError(
                "there is no run to resume: call `batch.run(…, kill_after_chunk=…)` first"
            )
        run_id, node = self._killed
        async with self._service() as service:
            await service.rescue(node)
            self._killed = None
            await self._finish(service, run_id, kill_after_chunk)
        return self._record(run_id)

    async def advance(
        self, *, days: float = 0, hours: float = 0, minutes: float = 0, seconds: float = 0
    ) -> list[RunRecord]:
        """Move the clock forward by this time, from slot to slot, and run everything that is due at
        each slot to its end.

        Waiting runs are opened at their time: those that were started with `at` or `delay`,
        follow-ups, and slots of tasks with `after`. Returns the runs that have ended during this
        call, including skipped ones, oldest first.
        """
        until = _after(days, hours, minutes, seconds)
        return await self._while_ending(lambda service: service.advance(until))

    async def down(
        self, *, days: float = 0, hours: float = 0, minutes: float = 0, seconds: float = 0
    ) -> list[RunRecord]:
        """Move the clock as if the service had been down for this time. The missed policies decide
        what runs now.

        Returns the runs that have ended during this call, oldest first.
        """
        until = _after(days, hours, minutes, seconds)
        return await self._while_ending(lambda service: service.jump(until))

    async def settle(self) -> list[RunRecord]:
        """Execute the runs that `start()` has queued, without moving the clock, and return those
        that have ended.
        """
        return await self._while_ending(lambda service: service.settle())

    def runs(self, task: TaskOrName | None = None) -> list[RunRecord]:
        """All runs, or those of one task, oldest first; without the parts of partitioned tasks."""
        named = self._known(task).name if task is not None else None
        return [run for run in run_records(self._recorder.chunks, task=named) if run.part is None]

    def parts(self, run: RunOrTask) -> list[RunRecord]:
        """The parts of a run, in the order of their numbers."""
        return run_records(self._recorder.chunks, awaited_by=self._id(run), origin="part")

    def missed(self, task: TaskOrName | None = None) -> list[MissedRange]:
        """The ranges of slots that did not run, with their reasons, oldest first."""
        return missed_ranges(self._known(task).name if task is not None else None)

    async def _finish(
        self,
        service: DrivenService,
        run_id: str,
        after_chunk: int | None,
        after_part: int | None = None,
    ) -> None:
        if after_chunk is None and after_part is None:
            await service.finish(run_id)
            return
        kill = await service.kill(run_id, after_chunk, after_part)
        if not kill.is_done:
            raise AssertionError(kill.missed(self._record(run_id)))
        self._killed = run_id, service.node

    def _known(self, task: TaskOrName) -> Task:
        """Raises UnknownTask for a name, InvalidTask for a class."""
        if not isinstance(task, str):
            return TaskRegistry.of(task)
        if task not in TaskRegistry.tasks():  # its file, or TASKS_DIR, is newer than the fixture
            self._load()
        try:
            return TaskRegistry.get(task)
        except UnknownTask as error:
            folders = " and ".join(dict.fromkeys(map(str, (Path.cwd(), self._root))))
            raise UnknownTask(
                f"{error.message} (TASKS_DIR is {get_settings().TASKS_DIR}, in {folders})"
            ) from None

    def _id(self, run: RunOrTask) -> str:
        """The id of a run, or that of the newest run of a task. Raises UnknownRun if the task has
        none.
        """
        if isinstance(run, RunRecord):
            return run.id
        if isinstance(run, str) and run not in TaskRegistry.tasks():
            return run
        if not (records := self.runs(run)):
            raise UnknownRun(f"the task {self._known(run).name} has no run yet")
        return records[-1].id

    def _record(self, run_id: str) -> RunRecord:
        [record] = run_records(self._recorder.chunks, id=run_id)
        return record

    async def _while_ending(
        self, work: Callable[[DrivenService], Awaitable[None]]
    ) -> list[RunRecord]:
        before = ended_ids()
        async with self._service() as service:
            await work(service)
        return [
            record for record in self.runs() if record.state in FINAL and record.id not in before
        ]

    @asynccontextmanager
    async def _service(self) -> AsyncIterator[DrivenService]:
        if self._is_busy:
            raise BatchError(
                "another call of `batch` is not over; await it first, because all calls share one "
                "clock"
            )
        self._broken += followers.settle()
        if self._broken and self._only is None:
            problems = "; ".join(
                f"{file.source} can't be used: {file.error}" for file in self._broken
            )
            raise BatchError(
                f"{problems}. If a test needs only some tasks, batch.only(…) ignores such files"
            )
        self._is_busy = True
        try:
            tasks = TaskRegistry.tasks()
            prepare = (self._failures.prepare, self._upstreams.prepare)
            async with DrivenService(
                tasks, self._only, prepare, self._recorder, self.patience
            ) as service:
                yield service
        finally:
            self._is_busy = False


def _after(days: float, hours: float, minutes: float, seconds: float) -> datetime:
    duration = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    if duration < timedelta(0):
        raise ValueError(f"the clock can't go back by {-duration}: slots have been fired")
    return clock.now() + duration
