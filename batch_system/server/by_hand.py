"""create_scheduler, start_scheduler and stop_scheduler: run the service without the lifespan."""

from __future__ import annotations

import asyncio

from apscheduler.schedulers.asyncio import AsyncIOScheduler

from batch_system import logs
from batch_system.batch.firing import apscheduler
from batch_system.batch.tasks.registry import TaskRegistry
from batch_system.errors import BatchError
from batch_system.logs import get_logger
from batch_system.server.service import BatchService
from batch_system.server.shutdown import serving
from batch_system.settings.reading import get_settings

logger = get_logger("batch_system.batch")


class _ServiceTask:
    """Runs one service in an asyncio task, which also stops the service if it is cancelled."""

    def __init__(self) -> None:
        self._settings = get_settings()
        self._batch = BatchService(self._settings)
        self._stop_requested = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.scheduler = self._batch.scheduler
        apscheduler.add_jobs(self.scheduler, TaskRegistry.tasks().values())

    @property
    def is_started(self) -> bool:
        return self._task is not None

    def start(self) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        self._started = loop.create_future()
        self._task = loop.create_task(self._run())
        self._task.add_done_callback(self._report_failure)
        apscheduler.start(self.scheduler)
        return self._started

    def stop(self) -> asyncio.Future[None]:
        apscheduler.stop(self.scheduler)
        self._stop_requested.set()
        if self._task is not None and not self._started.done():
            self._task.cancel()
        return asyncio.ensure_future(self._wait())

    async def _run(self) -> None:
        with logs.keep_run_lines(self._settings.LOG_LEVEL):
            async with serving(self._batch, self._settings, is_guest=True):
                if not self._started.done():  # cancelled if the awaiting code was
                    self._started.set_result(None)
                await self._stop_requested.wait()

    async def _wait(self) -> None:
        if self._task is not None:
            await asyncio.wait([self._task])

    def _report_failure(self, task: asyncio.Task[None]) -> None:
        """Raise the failure where the start is awaited, and also log it, because the start need not
        be awaited.
        """
        error = None if task.cancelled() else task.exception()
        if not self._started.done():
            self._started.set_exception(
                error or BatchError("the batch service was stopped before it had started")
            )
            # Otherwise asyncio would warn that the exception was never retrieved.
            self._started.exception()
        if error is not None:
            apscheduler.stop(self.scheduler)
            is_known = isinstance(error, BatchError)
            logger.error(
                f"the batch service has ended: {error}", exc_info=None if is_known else error
            )


def create_scheduler() -> AsyncIOScheduler:
    """The scheduler of a new batch service, with a job for each registered task: id = name, name =
    description.

    The service takes its settings from the environment. When it starts, it also loads the tasks in
    TASKS_DIR. Raises InvalidSetting.
    """
    service_task = _ServiceTask()
    service_task.scheduler.batch = service_task
    return service_task.scheduler


def start_scheduler(scheduler: AsyncIOScheduler) -> asyncio.Future[None]:
    """Start the service of a scheduler from create_scheduler() on the running event loop.

    The jobs have their next run times at once. Await the returned future to wait until the service
    has started: it raises BatchError if the service can't start. Raises BatchError if no event loop
    runs, or on a second start.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise BatchError(
            "start_scheduler() needs a running event loop: call it in an `async def`"
        ) from None
    if scheduler.batch.is_started:
        raise BatchError(
            "this scheduler was started before: make another one with create_scheduler()"
        )
    return scheduler.batch.start()  # type: ignore[no-any-return] # APScheduler 3 has no types


def stop_scheduler(scheduler: AsyncIOScheduler) -> asyncio.Future[None]:
    """Stop firing at once, and stop the service.

    Await the returned future to wait for the stop. Runs that do not end within DRAIN_SECONDS are
    interrupted, and the next service on the ledger resumes them.
    """
    return scheduler.batch.stop()  # type: ignore[no-any-return] # APScheduler 3 has no types
