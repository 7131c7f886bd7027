"""BatchService: all the parts of one process, put together, started and stopped in order."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service import sentry
from service.batch import catalog, fence, scheduler, slots, starting
from service.batch.cancelling import Cancelling
from service.batch.dispatcher import Dispatcher
from service.batch.engines.local import LocalEngine
from service.batch.folder import TasksFolder
from service.batch.loader import BrokenFile, folder_of
from service.batch.node import Node
from service.batch.pruning import Keep, Pruner
from service.batch.registry import Task
from service.batch.schedules import Schedules
from service.batch.upkeep import Upkeep
from service.config import Settings
from service.database.engine import Database
from service.database.migrate import History, migrate
from service.database.session import use_application_database
from service.errors import DatabaseError, InvalidSetting
from service.logs import get_logger

logger = get_logger("service.batch")

ANSWER_SECONDS = 3.0

LEDGER_HISTORY = History(Path(__file__).parent / "batch/migrations", "batch_alembic_version")
APPLICATION_HISTORY = History(Path(__file__).parent / "application/migrations", "alembic_version")


class BatchService:
    """The batch service of one process, on the running event loop. `fires=False`: runs only what it is handed."""

    scheduler: AsyncIOScheduler
    engine: LocalEngine
    folder: TasksFolder
    tasks: dict[str, Task]

    def __init__(self, settings: Settings, fires: bool = True) -> None:
        self._settings = settings
        self._fires = fires
        self.node = Node(settings.ledger_url, settings.HEARTBEAT_SECONDS, settings.LEASE_SECONDS)
        self.is_stopping = False

    async def start(self) -> None:
        """Migrate, load the tasks, register this node, and begin to fire. Raises BatchError when it can't.

        What was started is stopped again when a later part fails.
        """
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(sentry.reporting(self._settings))
            await self._open(stack)
            try:
                await self._join(stack)
                if self._fires:
                    await self._fire(stack)
            except DBAPIError as error:
                raise self.ledger.unreachable(error) from error
            _collect_garbage_less_often(stack)
            self._stack = stack.pop_all()

    async def stop(self) -> None:
        """Stop firing, let active runs end for DRAIN_SECONDS, interrupt the rest, and leave."""
        self.is_stopping = True
        await self._stack.aclose()

    @property
    def broken(self) -> list[BrokenFile]:
        """The files of tasks that can't be used."""
        return self.folder.broken

    async def _open(self, stack: AsyncExitStack) -> None:
        folder_of(self._settings.TASKS_DIR)  # where it is wrong, no database is made
        self.application, self.ledger = await open_databases(self._settings, client=f"batch/{self.node.id}")
        stack.push_async_callback(self.ledger.dispose)
        stack.push_async_callback(self.application.dispose)
        use_application_database(self.application, partial(fence.guard, idle_seconds=self._settings.LEASE_SECONDS))
        stack.callback(use_application_database, None)
        self.folder = TasksFolder(self._settings.TASKS_DIR)
        self.tasks = self.folder.load()

    async def _join(self, stack: AsyncExitStack) -> None:
        """Become a node, with an engine that can run things."""
        settings = self._settings
        async with self.ledger.engine.begin() as connection:
            now = await slots.now_of(connection)
            await catalog.record_tasks(connection, self.tasks, now)
            await self.node.register(connection, self.tasks, now)
        stack.push_async_callback(self._leave)
        self.engine = LocalEngine(
            self.ledger,
            self.tasks,
            self.node.id,
            max_running=settings.MAX_RUNNING,
            max_threads=settings.MAX_THREADS,
            poll_seconds=settings.POLL_SECONDS,
            claims=self._fires,
            may_work=lambda: self.node.lease.is_held,
        )
        self.node.start(on_loss=self.engine.give_up, on_rescue=self.engine.wake)
        stack.push_async_callback(self.node.stop)
        self.cancelling = Cancelling(self.ledger, self.engine)
        for part in (self.engine, self.cancelling):
            part.start()
            stack.push_async_callback(part.stop)
        starting.use_service(self.ledger, self.engine.wake)
        stack.callback(starting.use_no_service)
        stack.push_async_callback(self.engine.drain, settings.DRAIN_SECONDS)
        stack.push_async_callback(self._say_draining)

    async def _fire(self, stack: AsyncExitStack) -> None:
        self.dispatcher = Dispatcher(self.ledger, self.tasks, self.node.id, self.engine)
        notify, lease = self.dispatcher.notify, self._settings.LEASE_SECONDS
        self.scheduler = scheduler.create_scheduler(notify)
        self.schedules = Schedules(self.ledger, self.folder, self.tasks, self.node.id, self.scheduler, notify, lease)
        await self.schedules.open()
        await self.schedules.follow()
        keep = Keep(self._settings.KEEP_RUNS_DAYS, self._settings.KEEP_RUNS_PER_TASK)
        upkeep = Upkeep(Pruner(self.ledger, self.application, keep))
        for part in (self.dispatcher, self.schedules, upkeep):
            part.start()
            stack.push_async_callback(part.stop)
        scheduler.start_scheduler(self.scheduler)
        stack.callback(scheduler.stop_scheduler, self.scheduler)
        for name, task in self.tasks.items():
            if task.schedule is not None:
                notify(name)

    async def _say_draining(self) -> None:
        await self._write_if_reachable(self.node.drain)

    async def _leave(self) -> None:
        if await self._write_if_reachable(self.node.leave):
            await self.node.forget()

    async def _write_if_reachable(self, write: Callable[[AsyncConnection], Awaitable[None]]) -> bool:
        try:
            async with self.ledger.engine.begin() as connection:
                await write(connection)
        except (DBAPIError, DatabaseError, OSError) as error:
            logger.warning(f"the ledger can't be reached: {str(error).splitlines()[0]}")
            return False
        return True

    async def readiness(self) -> dict[str, str]:
        """What keeps this process from working, by part; empty when it is ready."""
        wrong = {}
        if self.is_stopping:
            wrong["service"] = "it is stopping"
        for name, database in (("application", self.application), ("ledger", self.ledger)):
            try:
                async with asyncio.timeout(ANSWER_SECONDS), database.reader.connect() as connection:
                    await connection.execute(text("SELECT 1"))
            except (DBAPIError, DatabaseError, OSError) as error:
                wrong[name] = f"the database does not answer ({type(error).__name__})"
        if not self.node.lease.is_held and not self.is_stopping:
            wrong["lease"] = "it could not be renewed, so nothing is started until it is"
        parts = {
            "engine": self.engine.is_alive,
            "cancelling": self.cancelling.is_alive,
            "heartbeat": self.node.is_beating,
        }
        if self._fires:
            parts |= {"dispatcher": self.dispatcher.is_alive, "schedules": self.schedules.is_alive}
        wrong |= {name: "it has ended" for name, is_alive in parts.items() if not is_alive and not self.is_stopping}
        return wrong


def _collect_garbage_less_often(stack: AsyncExitStack) -> None:
    """A full collection in a burst of 10,000 runs stops the loop for a third of a second (measured)."""
    stack.callback(gc.set_threshold, *gc.get_threshold())
    stack.callback(gc.unfreeze)
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


async def open_databases(settings: Settings, client: str = "batch") -> tuple[Database, Database]:
    """The application's database and the ledger, reachable and migrated. Raises DatabaseError, InvalidSetting."""
    _refuse_memory(settings)
    _refuse_one_file(settings)
    application = Database(
        settings.DATABASE_URL, setting="DATABASE_URL", pool_size=settings.DATABASE_POOL_SIZE, client=client
    )
    ledger = Database(settings.ledger_url, setting="LEDGER_URL", pool_size=5, client=client)
    try:
        await application.check()
        await ledger.check()
        await migrate(application, APPLICATION_HISTORY)
        await migrate(ledger, LEDGER_HISTORY)
    except BaseException:
        await application.dispose()
        await ledger.dispose()
        raise
    return application, ledger


def _refuse_memory(settings: Settings) -> None:
    for name, url in (("DATABASE_URL", settings.DATABASE_URL), ("LEDGER_URL", settings.ledger_url)):
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
            raise InvalidSetting(f"setting {name}: a database in memory is gone with its connection; give it a file")


def _refuse_one_file(settings: Settings) -> None:
    urls = [make_url(url) for url in (settings.DATABASE_URL, settings.ledger_url)]
    if all(url.get_backend_name() == "sqlite" for url in urls):
        files = {Path(url.database or "").resolve() for url in urls}
        if len(files) == 1:
            raise InvalidSetting(
                "setting LEDGER_URL: it is the same SQLite file as DATABASE_URL, whose one writer would stop the "
                "service whenever a task holds a session open; give the ledger a file of its own, or leave it empty"
            )
