"""create_scheduler, start_scheduler and stop_scheduler: the service for code that starts it without the lifespan."""

from __future__ import annotations

import asyncio

from apscheduler.schedulers.asyncio import AsyncIOScheduler

from service import logs
from service.batch.firing import apscheduler
from service.batch.tasks.registry import TaskRegistry
from service.config import get_settings
from service.errors import BatchError
from service.logs import get_logger
from service.server.app import serving
from service.server.batch_service import BatchService

logger = get_logger("service.batch")


class _Serving:
    """One service, in an asyncio task of its own: that stops the service also where it is cancelled."""

    def __init__(self) -> None:
        self._settings = get_settings()
        self._batch = BatchService(self._settings)
        self._is_over = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.scheduler = self._batch.scheduler
        for task in TaskRegistry.tasks().values():
            apscheduler.add_job(self.scheduler, task, self._batch.notify)

    @property
    def is_started(self) -> bool:
        return self._task is not None

    def start(self) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        self._started = loop.create_future()
        self._task = loop.create_task(self._run())
        self._task.add_done_callback(self._tell_failure)
        apscheduler.start(self.scheduler)
        return self._started

    def stop(self) -> asyncio.Future[None]:
        apscheduler.stop(self.scheduler)
        self._is_over.set()
        if self._task is not None and not self._started.done():
            self._task.cancel()
        return asyncio.ensure_future(self._wait())

    async def _run(self) -> None:
        with logs.keep_run_lines(self._settings.LOG_LEVEL):
            async with serving(self._batch, self._settings, is_guest=True):
                if not self._started.done():  # whoever awaits it may have been cancelled
                    self._started.set_result(None)
                await self._is_over.wait()

    async def _wait(self) -> None:
        if self._task is not None:
            await asyncio.wait([self._task])

    def _tell_failure(self, task: asyncio.Task[None]) -> None:
        """Nobody has to await the start, so the log says it too."""
        error = None if task.cancelled() else task.exception()
        if not self._started.done():
            self._started.set_exception(error or BatchError("the batch service was stopped before it had started"))
            self._started.exception()  # asyncio need not say that nobody has asked for it
        if error is not None:
            apscheduler.stop(self.scheduler)
            known = isinstance(error, BatchError)
            logger.error(f"the batch service has ended: {error}", exc_info=None if known else error)


def create_scheduler() -> AsyncIOScheduler:
    """The scheduler of a new batch service, with a job for each registered task: id = name, name = description.

    The service has the settings of the environment. It also loads the tasks in TASKS_DIR when it starts.
    Raises InvalidSetting.
    """
    made = _Serving()
    made.scheduler.batch = made
    return made.scheduler


def start_scheduler(scheduler: AsyncIOScheduler) -> asyncio.Future[None]:
    """Start the service of `scheduler`, which create_scheduler made, on the running event loop.

    Jobs have their next run times at once. Await what it returns to wait until the service has started; that raises
    BatchError where it can't. Raises BatchError where no event loop runs, or where it was started before.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise BatchError("start_scheduler() needs a running event loop: call it in an `async def`") from None
    if scheduler.batch.is_started:
        raise BatchError("this scheduler was started before: make another one with create_scheduler()")
    return scheduler.batch.start()  # type: ignore[no-any-return] # APScheduler 3 has no types


def stop_scheduler(scheduler: AsyncIOScheduler) -> asyncio.Future[None]:
    """Fire nothing more from now on, and stop the service.

    Await what it returns to wait for that: runs have DRAIN_SECONDS to end, and are interrupted then. The next service
    on the ledger goes on with those.
    """
    return scheduler.batch.stop()  # type: ignore[no-any-return] # the same
