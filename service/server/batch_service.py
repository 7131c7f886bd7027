"""BatchService: makes all parts of the service in one process, and starts and stops them in
order.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import datetime
from functools import partial

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from sqlalchemy.exc import DBAPIError

from service import sentry
from service.alerts.channels import Channels
from service.batch.context import fencing
from service.batch.execution import closing
from service.batch.execution.local_engine import LocalEngine
from service.batch.execution.tickets import Tickets
from service.batch.firing import apscheduler
from service.batch.firing.dispatcher import Dispatcher
from service.batch.firing.opener import Opener
from service.batch.firing.schedule_sync import ScheduleSync
from service.batch.ledger import wakes
from service.batch.nodes.clock_steps import ClockSteps
from service.batch.nodes.harm import LostLease
from service.batch.nodes.ledger_poll import LedgerChanges
from service.batch.nodes.new_tasks import NewTasks, NewTasksLoop
from service.batch.nodes.node import Node
from service.batch.nodes.roles import Roles
from service.batch.queue import enqueue
from service.batch.retention.pruning import Pruner
from service.batch.retention.retention import Keep
from service.batch.retention.upkeep import Upkeep
from service.batch.tasks.broken_files import BrokenFile
from service.batch.tasks.discovery import folder_of
from service.batch.tasks.live_reload import TasksFolder
from service.batch.tasks.registry import Task
from service.concurrency.background import Background
from service.concurrency.offload import offload
from service.concurrency.supervisor import Supervisor
from service.config import Settings
from service.database import checkpoints, open_file
from service.database.open_file import OpenFile
from service.database.session import leave_application_database, use_application_database
from service.logs import get_logger
from service.metrics.process import ProcessMetrics
from service.operations.asking.context import Loaded
from service.operations.asking.databases import open_databases
from service.operations.here import use_no_operations, use_operations
from service.operations.operations import Operations
from service.server.bulk_worker import BulkWorker
from service.server.child_pools import ChildPools
from service.server.damage import after_damage, damage_explained
from service.server.draining import end_work
from service.server.measuring import Monitoring
from service.server.placers import placing_of
from service.server.readiness import Troubles, is_working, reasons, reasons_while_stopping
from service.server.sign_off import SignOff
from service.server.sign_on import sign_on
from service.server.waking import Waking
from service.server.watching import Watching, start_pings

logger = get_logger("service.batch")


class BatchService:
    """The batch service of one process, on the running event loop.

    What it does is said by its roles: a service fires schedules, and a worker only executes the
    runs of some pools.
    """

    engine: LocalEngine
    folder: TasksFolder
    tasks: dict[str, Task]
    operations: Operations

    def __init__(
        self, settings: Settings, roles: Roles | None = None, version: str | None = None
    ) -> None:
        """`roles`: what it does; None: it is a service that claims the runs of all pools that are
        not left to others.

        `version`: of the application around the service; None: that of the setting, of git, or of
        its files.
        """
        self._version = version or settings.BATCH_VERSION
        self.settings = self._settings = settings
        self.roles = roles or Roles.of_service(settings.pools)
        self._fires = self.roles.fires
        self._on_changes: list[Callable[[LedgerChanges], None]] = []
        self.metrics = ProcessMetrics()
        self.supervisor = Supervisor(self.metrics.count_failed)
        self.node = Node(
            settings.ledger_url,
            settings.HEARTBEAT_SECONDS,
            settings.LEASE_SECONDS,
            settings.POLL_SECONDS,
            roles=self.roles,
            setting=settings.ledger_setting,
            metrics=self.metrics,
            capacity=settings.MAX_RUNNING,
        )
        self.tickets = Tickets() if self.roles.on_tickets else None
        self.stopping = asyncio.Event()
        """Set when the service begins to stop. Streaming responses end then, because a server waits
        for them.
        """
        self._drain: asyncio.Task[None] | None = None
        self._parts: list[Background] = []
        self._waking = Waking(self.roles)
        self.wake = self._waking.wake
        self._is_firing = False
        self.scheduler: AsyncIOScheduler = apscheduler.new_scheduler()
        self._sign_off = SignOff(self.node, settings)

    async def start(self) -> None:
        """Migrate the databases, load the tasks, register this node, and begin to fire. A worker
        migrates nothing.

        If a part can't start, the parts that were started are stopped. Raises BatchError.
        """
        with damage_explained(self._settings):
            await self._start()

    async def _start(self) -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(sentry.reporting(self._settings))
            await self._open(stack)
            try:
                await self._join(stack)
                self._start_parts(*checkpoints.of(self.ledger))
                if self.roles.pools:
                    self._start_parts(self.opener, Troubles(self.node, self._troubles))
                if self._fires:
                    await self._fire(stack)
                elif self.roles.is_worker:
                    self._start_parts(NewTasksLoop(self.ledger, self.new_tasks, self.node.outage))
            except DBAPIError as error:
                raise self.ledger.unreachable(error) from error
            self._stack = stack.pop_all()

    def drain(self) -> asyncio.Task[None]:
        """Stop firing and claiming now, wait DRAIN_SECONDS for active runs to end, and interrupt
        the others.

        The returned task ends when no run is active. The databases stay open until `stop` is
        called.
        """
        if self._drain is None:
            self.stopping.set()
            self.engine.begin_drain()
            if self._is_firing and self.scheduler.running:
                self.scheduler.pause()  # not shut down, so that its jobs can still be listed
            seconds = self._settings.DRAIN_SECONDS
            self._drain = asyncio.create_task(
                end_work(self.ledger, self.node, self.engine, self._parts, seconds)
            )
        return self._drain

    async def stop(self) -> None:
        """Drain, sign this node off in the ledger, and close the databases."""
        self.stopping.set()
        await self._stack.aclose()

    def before_stop(self, end: Callable[[], Awaitable[None]]) -> None:
        """Call `end` when the service stops, while the ledger can still be used."""
        self._stack.push_async_callback(end)

    def leave_at_once(self) -> None:
        """Sign this node off from another thread, right before the process is ended: its runs are
        interrupted.
        """
        self._sign_off.at_once()

    def accuse(self, run: str, what: str) -> None:
        """Note from another thread what this run does, right before the process is ended because of
        that.
        """
        self._sign_off.accuse(run, what)

    @property
    def is_stopping(self) -> bool:
        """Whether the service has begun to stop."""
        return self.stopping.is_set()

    @property
    def broken(self) -> list[BrokenFile]:
        """The files of tasks that can't be used."""
        return self.folder.broken

    async def _open(self, stack: AsyncExitStack) -> None:
        folder_of(self._settings.TASKS_DIR)  # raises before a database is made
        self._channels = await offload(Channels.of, self._settings)
        self.application, self.ledger = await open_databases(
            self._settings, client=f"batch/{self.node.id}", migrates=not self.roles.is_worker
        )
        stack.push_async_callback(self.ledger.dispose)
        stack.push_async_callback(self.application.dispose)
        files = await offload(self._open_files, stack)
        self.ledger.on_damage = self._on_damage
        self.node.watch_files(files, self.supervisor.fail, self._on_damage)
        use_application_database(
            self.application, partial(fencing.guard, idle_seconds=self._settings.LEASE_SECONDS)
        )
        stack.callback(leave_application_database, self.application)
        self.folder = TasksFolder(self._settings.TASKS_DIR, shows_tracebacks=bool(self.roles.pools))
        self.tasks = self.folder.load()
        self.new_tasks = NewTasks(self.ledger, self.folder, self.tasks, self.node.id)
        self.metrics.labels.admit(self.tasks)

    def _open_files(self, stack: AsyncExitStack) -> dict[str, OpenFile]:
        """The files of SQLite, by the name of the database. Blocks. Raises DatabaseUnreachable."""
        files = {}
        for name, database in (("ledger", self.ledger), ("application", self.application)):
            try:
                file = open_file.of(database.url)
            except (sqlite3.Error, OSError) as error:
                raise database.unreachable(error) from error
            if file is not None:
                stack.callback(file.close)
                files[name] = file
        return files

    def _on_damage(self, cause: str) -> None:
        """Called in any thread: a later try can't succeed, and the log would be full of the same
        error.
        """
        self.supervisor.fail(
            "ledger", f"{cause}. {after_damage(self._settings, self.ledger.url.database or '')}"
        )

    async def _join(self, stack: AsyncExitStack) -> None:
        """Register this process as a node, and start its engine."""
        settings = self._settings
        await sign_on(self.ledger, self.node, self.tasks, self.broken, settings, self._version)
        stack.push_async_callback(self._sign_off.through, self.ledger)
        self.child_pools = ChildPools(settings, self.tasks, self.node)
        stack.push_async_callback(self.child_pools.stop)
        on_closed = partial(closing.tell, self.metrics, self.tasks)
        self.opener = Opener(
            self.ledger, self.tasks if self._fires else {}, self.wake, self.node.outage, on_closed
        )
        self.engine = LocalEngine(
            self.ledger,
            self.tasks,
            self.node.id,
            max_running=settings.MAX_RUNNING,
            max_threads=settings.MAX_THREADS,
            pools=self.roles.pools,
            child_pools=self.child_pools.by_name,
            may_work=lambda: self.node.lease.is_held,
            outage=self.node.outage,
            metrics=self.metrics,
            on_ended=self.opener.on_ended,
            tickets=self.tickets,
        )
        self._waking.engine = self.engine
        wakes.use_engine(self.ledger.engine, partial(self._waking.takes, self.tasks))
        stack.callback(wakes.use_no_engine, self.ledger.engine)
        self.node.be_supervised(self.supervisor)
        self.node.start(
            self._on_loss,
            self._on_rescue,
            self._hand_out,
            self._waking.on_queued,
            on_replaced=self._on_replaced,
        )
        stack.push_async_callback(self.node.stop)
        self._on_changes.append(self.engine.on_changes)
        self.supervisor.start(self.engine)
        self.child_pools.serve(self.new_tasks)
        stack.push_async_callback(self.engine.stop)
        self._answer(stack)
        if self.roles.pools:
            stack.push_async_callback(start_pings(settings, self._is_working, self.supervisor))
        stack.push_async_callback(self.drain)

    def _answer(self, stack: AsyncExitStack) -> None:
        """Answer what people and programs ask, and let code on this event loop start runs."""
        self.operations = Operations(
            self.ledger,
            self.application,
            lambda: Loaded(self.tasks, self.folder.broken),
            self._settings,
            wake=self.wake,
            wake_bulks=self._wake_bulks,
            node=self.node.id,
            troubles=lambda: self.node.troubles,
            are_ready=True,
        )
        self.monitoring = Monitoring(self.metrics, self.engine, self.node, self.operations)
        stack.push_async_callback(self.monitoring.gauges.stop)
        use_operations(self.operations)
        stack.callback(use_no_operations)
        enqueue.use_service(self.ledger, self.wake)
        stack.callback(enqueue.use_no_service)

    async def _fire(self, stack: AsyncExitStack) -> None:
        lease, outage = self._settings.LEASE_SECONDS, self.node.outage
        self.dispatcher = Dispatcher(
            *(
                self.ledger,
                self.tasks,
                self.node.id,
                self.engine,
                outage,
                self.metrics,
                self.opener.wake,
                lease,
            ),
            steps=(steps := ClockSteps()),
        )
        self._on_changes.append(steps.on_changes)
        self.dispatcher.on_queued = self.wake
        settings = self._settings
        apscheduler.prepare(self.scheduler)
        stack.callback(apscheduler.stop, self.scheduler)
        apscheduler.add_jobs(self.scheduler, self.tasks.values(), self.notify)
        self.schedules = ScheduleSync(
            self.ledger,
            self.new_tasks,
            self.tasks,
            self.node.id,
            self.scheduler,
            self.notify,
            lease,
            outage,
        )
        self.dispatcher.on_fired = self.schedules.on_fired
        await self.schedules.open()
        await self.schedules.update_jobs()
        self._on_changes += [self.schedules.on_changes, self.dispatcher.on_changes]
        keep = Keep(
            settings.KEEP_RUNS_DAYS, settings.KEEP_RUNS_PER_TASK, settings.BATCH_KEEP_EVENTS_DAYS
        )
        upkeep = Upkeep(self.ledger, self.tasks, Pruner(self.ledger, self.application, keep))
        self._bulks = BulkWorker(self.operations)
        watching = Watching(
            settings,
            self._channels,
            self.ledger,
            self.application,
            self.node,
            self.metrics,
            self.operations,
        )
        watching.watch.unfired = lambda: self.schedules.unfired.found
        self.opener.follow(lambda: self.schedules.upstreams, lambda: watching.watch.holds)
        self._on_changes += [watching.on_changes, self.opener.on_changes]
        if (placing := await placing_of(settings, self.ledger, self.node, self.tasks)) is not None:
            self._waking.placing = placing
            self._on_changes.append(placing.on_changes)
            self._start_parts(placing)
        self._start_parts(self.dispatcher, self.schedules, upkeep, self._bulks, *watching.parts)
        self._is_firing = True
        apscheduler.start(self.scheduler)
        self.schedules.fire_due()

    def _start_parts(self, *parts: Background) -> None:
        self.supervisor.start(*parts)
        self._parts += parts

    def _is_working(self) -> bool:
        return (
            self._is_firing
            and not self.is_stopping
            and is_working(self.node, self.dispatcher, self.schedules)
        )

    def _wake_bulks(self) -> None:
        if self._is_firing:
            self._bulks.wake()

    def _on_loss(self, lost: LostLease | None) -> None:
        """This node has lost its lease. What still waits for the ledger on a connection of before
        never ends.
        """
        self.engine.give_up(lost)
        self.ledger.sever()

    def _on_replaced(self) -> None:
        """The server takes no writes any more: all connections are opened anew, to the one that has
        taken over.
        """
        self.ledger.sever()
        self.application.sever()

    def _on_rescue(self) -> None:
        """A node has died: its runs can be claimed, and its bulks carried on."""
        self.wake()
        self._wake_bulks()

    def notify(self, name: str, slot: datetime | None = None) -> None:
        """A slot of this task is due now, or at `slot`. Before the start it is not needed: what is
        due fires then.
        """
        if self._is_firing:
            self.dispatcher.notify(name, slot)

    def _hand_out(self, changes: LedgerChanges) -> None:
        self.metrics.last_tick = changes.now
        for on_changes in self._on_changes:
            on_changes(changes)

    @property
    def warnings(self) -> dict[str, str]:
        """What holds up runs of this process, although it is ready, by the name of the part."""
        return {"threads": crowded} if (crowded := self.engine.crowded) is not None else {}

    async def _troubles(self) -> dict[str, str]:
        return {} if self.is_stopping else await self.readiness() | self.warnings

    async def readiness(self) -> dict[str, str]:
        """The parts that are not ready, each with the reason; empty if this process is ready."""
        failures = self.supervisor.failures
        if self.is_stopping:
            return await reasons_while_stopping(self.application, self.ledger) | failures
        firing = (self.dispatcher, self.schedules) if self._fires else None
        return (
            await reasons(self.application, self.ledger, self.node, self.engine, firing) | failures
        )
