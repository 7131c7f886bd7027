"""The service of one process: BatchService builds its parts, and starts and stops them in order."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from datetime import timedelta
from functools import partial

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from sqlalchemy.exc import DBAPIError

from batch_system import sentry
from batch_system.alerts.channels import Channels
from batch_system.alerts.pings import Pings
from batch_system.alerts.sender import Sender
from batch_system.batch.context import fencing
from batch_system.batch.execution import pings
from batch_system.batch.execution.engine import LocalEngine
from batch_system.batch.execution.outcomes import report_closed
from batch_system.batch.execution.tickets import Tickets
from batch_system.batch.firing import apscheduler
from batch_system.batch.firing.dispatcher import Dispatcher
from batch_system.batch.firing.handover import Handover
from batch_system.batch.firing.limit_functions import LimitFunctions
from batch_system.batch.firing.schedule_sync import ScheduleSync
from batch_system.batch.firing.waiting import Opener
from batch_system.batch.incidents.watch import Watch
from batch_system.batch.incidents.watched import Thresholds
from batch_system.batch.ledger import wakes
from batch_system.batch.night.keeper import TallyKeeper
from batch_system.batch.nodes.harm import LostLease
from batch_system.batch.nodes.ledger_poll import LedgerChanges
from batch_system.batch.nodes.new_tasks import NewTasks, NewTasksLoop
from batch_system.batch.nodes.node import Node
from batch_system.batch.nodes.roles import Roles
from batch_system.batch.placing.placing import Placing
from batch_system.batch.queue import enqueue, session_starts
from batch_system.batch.retention.pruning import Pruner
from batch_system.batch.retention.retention import Keep
from batch_system.batch.retention.upkeep import Upkeep
from batch_system.batch.tasks.broken_files import BrokenFile
from batch_system.batch.tasks.discovery import folder_of
from batch_system.batch.tasks.live_reload import TasksFolder
from batch_system.batch.tasks.registry import Task
from batch_system.concurrency.background import Background
from batch_system.concurrency.offload import offload
from batch_system.concurrency.supervisor import Supervisor
from batch_system.database import checkpoints, open_file
from batch_system.database.open_file import OpenFile
from batch_system.database.session import leave_application_database, use_application_database
from batch_system.errors import BatchError
from batch_system.logs import get_logger
from batch_system.metrics.process import ProcessMetrics, ProcessSnapshot
from batch_system.operations.asking.context import Loaded
from batch_system.operations.asking.databases import open_databases
from batch_system.operations.here import use_no_operations, use_operations
from batch_system.operations.operations import Operations
from batch_system.server.damage import after_damage, damage_explained
from batch_system.server.digest import Digest
from batch_system.server.lifecycle import SignOff, end_work, sign_on
from batch_system.server.pools import ChildPools, placing_of
from batch_system.server.readiness import Troubles, is_working, reasons, reasons_while_stopping
from batch_system.settings.settings import Settings

logger = get_logger("batch_system.batch")

BULK_SECONDS = 10.0
"""The seconds between two looks for bulks, after an error or while another process carries one
out.
"""


class BatchService:
    """The batch service of one process, on the running event loop.

    Its roles say what it does: a service fires schedules, and a worker only executes the runs of
    some pools.
    """

    engine: LocalEngine
    folder: TasksFolder
    tasks: dict[str, Task]
    operations: Operations

    def __init__(
        self, settings: Settings, roles: Roles | None = None, version: str | None = None
    ) -> None:
        """`roles`: what it does; by default it is a service that claims the runs of all pools that
        no other process has to serve.

        `version`: that of the application around the service; by default that of the setting, of
        git, or of its files.
        """
        self.settings = settings
        self._version = version or settings.BATCH_VERSION
        self.roles = roles or Roles.of_service(settings.pools)
        self._fires = self.roles.fires
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
            pooler=settings.BATCH_DATABASE_POOLER,
        )
        self.tickets = Tickets() if self.roles.on_tickets else None
        self.stopping = asyncio.Event()
        """Set when the service begins to stop. Streaming responses then end, because a server waits
        for them.
        """
        self.scheduler: AsyncIOScheduler = apscheduler.new_scheduler()
        self._drain: asyncio.Task[None] | None = None
        self._parts: list[Background] = []
        self._on_changes: list[Callable[[LedgerChanges], None]] = []
        self._placing: Placing | None = None
        self._is_firing = False
        self._sign_off = SignOff(self.node, settings)

    async def start(self) -> None:
        """Migrate the databases, load the tasks, register this node, and begin to fire. A worker
        migrates nothing.

        If a part can't start, the parts that were started are stopped. Raises BatchError.
        """
        with damage_explained(self.settings):
            await self._start()

    async def _start(self) -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(sentry.reporting(self.settings))
            await self._open(stack)
            try:
                await self._execute(stack)
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
            seconds = self.settings.DRAIN_SECONDS
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
        """Sign this node off from another thread, just before the process is ended. Its runs are
        interrupted.
        """
        self._sign_off.at_once()

    def accuse(self, run: str, what: str) -> None:
        """Record from another thread what this run does, just before the process is ended because
        of it.
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

    # The following methods start the parts in this order. They are stopped in the reverse order.

    async def _open(self, stack: AsyncExitStack) -> None:
        """Open the databases, and load the tasks."""
        folder_of(self.settings.TASKS_DIR)  # raises before a database is made
        self._channels = await offload(Channels.of, self.settings)
        self.application, self.ledger = await open_databases(
            self.settings, client=f"batch/{self.node.id}", migrates=not self.roles.is_worker
        )
        stack.push_async_callback(self.ledger.dispose)
        stack.push_async_callback(self.application.dispose)
        files = await offload(self._open_files, stack)
        self.ledger.on_damage = self._on_damage
        self.node.watch_files(files, self.supervisor.fail, self._on_damage)
        use_application_database(
            self.application, partial(fencing.guard, idle_seconds=self.settings.LEASE_SECONDS)
        )
        stack.callback(leave_application_database, self.application)
        self.folder = TasksFolder(self.settings.TASKS_DIR, shows_tracebacks=bool(self.roles.pools))
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

    async def _execute(self, stack: AsyncExitStack) -> None:
        """Register this process as a node, and begin to execute runs."""
        await sign_on(self.ledger, self.node, self.tasks, self.broken, self.settings, self._version)
        stack.push_async_callback(self._sign_off.through, self.ledger)
        self.child_pools = ChildPools(self.settings, self.tasks, self.node)
        stack.push_async_callback(self.child_pools.stop)
        self.opener = Opener(
            self.ledger,
            self.tasks if self._fires else {},
            self.wake,
            self.node.outage,
            partial(report_closed, self.metrics, self.tasks),
        )
        self.engine = self._new_engine()
        wakes.use_engine(self.ledger.engine, self._takes)
        stack.callback(wakes.use_no_engine, self.ledger.engine)
        self.node.be_supervised(self.supervisor)
        self.node.start(
            self._on_loss,
            self._on_rescue,
            self._hand_out,
            self._on_queued,
            on_replaced=self._on_replaced,
        )
        stack.push_async_callback(self.node.stop)
        self._on_changes.append(self.engine.on_changes)
        self.supervisor.start(self.engine)
        self.child_pools.serve(self.new_tasks)
        stack.push_async_callback(self.engine.stop)
        self._answer(stack)
        if self.roles.pools:
            self._ping(stack)
        stack.push_async_callback(self.drain)

    def _new_engine(self) -> LocalEngine:
        return LocalEngine(
            self.ledger,
            self.tasks,
            self.node.id,
            max_running=self.settings.MAX_RUNNING,
            max_threads=self.settings.MAX_THREADS,
            pools=self.roles.pools,
            child_pools=self.child_pools.by_name,
            may_work=lambda: self.node.lease.is_held,
            outage=self.node.outage,
            metrics=self.metrics,
            on_ended=self.opener.on_ended,
            tickets=self.tickets,
        )

    def _answer(self, stack: AsyncExitStack) -> None:
        """Provide the operations for people and programs, and let code on this event loop start
        runs.
        """
        self.operations = Operations(
            self.ledger,
            self.application,
            lambda: Loaded(self.tasks, self.folder.broken),
            self.settings,
            wake=self.wake,
            wake_bulks=self._wake_bulks,
            node=self.node.id,
            troubles=lambda: self.node.troubles,
            are_ready=True,
        )
        from batch_system.operations.system.gauges import GaugeReader

        self.gauges = GaugeReader(self.operations.context, self.metrics)
        stack.push_async_callback(self.gauges.stop)
        use_operations(self.operations)
        stack.callback(use_no_operations)
        enqueue.use_service(self.ledger, self.wake)
        stack.callback(enqueue.use_no_service)

    def _ping(self, stack: AsyncExitStack) -> None:
        """Call dead man's switches from now on."""
        url = self.settings.BATCH_PING_URL
        address = url.get_secret_value() if url is not None else None
        calls = Pings(address, self._is_working, self.node.tell_ping)
        self.supervisor.start(calls)
        stack.push_async_callback(calls.stop)
        pings.use(calls.tell)
        stack.callback(pings.use, None)

    async def _fire(self, stack: AsyncExitStack) -> None:
        """Begin to fire schedules, and start the other parts that only services have."""
        self.dispatcher = self._new_dispatcher()
        apscheduler.prepare(self.scheduler)
        stack.callback(apscheduler.stop, self.scheduler)
        apscheduler.add_jobs(self.scheduler, self.tasks.values())
        self.schedules = ScheduleSync(
            self.ledger,
            self.new_tasks,
            self.tasks,
            self.node.id,
            self.scheduler,
            self.dispatcher.notify,
            self.settings.LEASE_SECONDS,
            self.node.outage,
        )
        self.dispatcher.on_fired = self.schedules.on_fired
        await self.schedules.open()
        await self.schedules.update_jobs()
        self._on_changes += [self.schedules.on_changes, self.dispatcher.on_changes]
        self._bulks = BulkWorker(self.operations)
        watching = self._watch()
        functions = LimitFunctions(self.ledger, self.tasks, self.wake, self.node.outage)
        self._on_changes += [self.opener.on_changes, functions.on_changes]
        handover = self._hand_over(stack)
        await self._place()
        parts = (self.dispatcher, self.schedules, self._new_upkeep(), self._bulks, handover)
        self._start_parts(*parts, functions, *watching)
        self._is_firing = True
        apscheduler.report_to(self.scheduler, self.dispatcher.notify)
        apscheduler.start(self.scheduler)
        self.schedules.fire_due()

    def _new_dispatcher(self) -> Dispatcher:
        dispatcher = Dispatcher(
            self.ledger,
            self.tasks,
            self.node.id,
            self.engine,
            self.node.outage,
            self.metrics,
            self.opener.wake,
            self.settings.LEASE_SECONDS,
        )
        dispatcher.on_queued = self.wake
        return dispatcher

    def _new_upkeep(self) -> Upkeep:
        settings = self.settings
        keep = Keep(
            settings.KEEP_RUNS_DAYS, settings.KEEP_RUNS_PER_TASK, settings.BATCH_KEEP_EVENTS_DAYS
        )
        return Upkeep(self.ledger, self.tasks, Pruner(self.ledger, self.application, keep))

    def _watch(self) -> list[Background]:
        """Make the parts that notice problems and notify people. They work on one node at a
        time.
        """
        settings = self.settings
        secret = settings.BATCH_ALERT_WEBHOOK_SECRET
        sender = Sender(
            self.ledger,
            self.node.id,
            self._channels,
            lambda: watch.holds,
            secret=secret.get_secret_value() if secret is not None else None,
            public_url=settings.BATCH_PUBLIC_URL,
            metrics=self.metrics,
        )
        keeper = TallyKeeper(self.ledger, self.node.id, lambda: watch.holds, self.node.outage)
        watch = Watch(
            self.ledger,
            self.application,
            self.node.id,
            _thresholds(settings),
            self._channels.named,
            sender.wake,
            self.node.outage,
            on_noticed=keeper.wake,
            lease=settings.LEASE_SECONDS,
        )
        watch.unfired = lambda: self.schedules.unfired.found
        self._watches = lambda: watch.holds
        self.opener.follow(lambda: self.schedules.upstreams, self._watches)
        self._on_changes.append(watch.on_changes)
        if settings.BATCH_DIGEST_CRON is None or not (readers := self._channels.digest()):
            return [watch, sender, keeper]
        digest = Digest(
            self.operations,
            self.ledger,
            settings.BATCH_DIGEST_CRON,
            readers,
            lambda: watch.holds,
        )
        self._on_changes.append(digest.on_changes)
        return [watch, sender, keeper, digest]

    def _hand_over(self, stack: AsyncExitStack) -> Handover:
        """Make the part that hands over starts that are committed with the application's data."""
        handover = Handover(
            self.application,
            self.ledger,
            timedelta(days=self.settings.KEEP_RUNS_DAYS),
            self.wake,
            self.node.outage,
            self._watches,
        )
        self._on_changes.append(handover.on_changes)
        session_starts.use_handover(handover.wake)
        stack.callback(session_starts.use_no_handover)
        return handover

    async def _place(self) -> None:
        """Place tickets for the pools whose runs execute elsewhere, if there are any."""
        self._placing = await placing_of(self.settings, self.ledger, self.node, self.tasks)
        if self._placing is not None:
            self._on_changes.append(self._placing.on_changes)
            self._start_parts(self._placing)

    def _start_parts(self, *parts: Background) -> None:
        self.supervisor.start(*parts)
        self._parts += parts

    # The parts call the following methods when something has happened that concerns others.

    def wake(self) -> None:
        """Runs may be able to start, here or where tickets are placed. Returns at once."""
        self.engine.wake()
        if self._placing is not None:
            self._placing.wake()

    def _on_queued(self, pools: frozenset[str] | None) -> None:
        """Another process has queued runs of these pools; None stands for any pool."""
        if pools is None or pools & self.roles.pools:
            self.engine.wake()
        if self._placing is not None and (pools is None or pools - self.roles.pools):
            self._placing.wake()

    def _takes(self, queued: Mapping[str, int]) -> bool:
        """Whether the engine takes this many runs of each task itself, so that other nodes need not
        be notified.
        """
        return self.tickets is None and self.engine.capacity.holds(self.tasks, queued)

    def _hand_out(self, changes: LedgerChanges) -> None:
        self.metrics.last_tick = changes.now
        for on_changes in self._on_changes:
            on_changes(changes)

    def _wake_bulks(self) -> None:
        if self._is_firing:
            self._bulks.wake()

    def _on_loss(self, lost: LostLease | None) -> None:
        """This node has lost its lease. Cut off all existing connections, because a wait on one of
        them might never end.
        """
        self.engine.give_up(lost)
        self.ledger.sever()

    def _on_replaced(self) -> None:
        """The server takes no writes any more. Open all connections again, to the server that has
        taken over.
        """
        self.ledger.sever()
        self.application.sever()

    def _on_rescue(self) -> None:
        """A node has died: its runs can be claimed, and its bulks continued."""
        self.wake()
        self._wake_bulks()

    def _on_damage(self, cause: str) -> None:
        """End the process, because no later try can succeed, and the log would fill with the same
        error. Called in any thread.
        """
        self.supervisor.fail(
            "ledger", f"{cause}. {after_damage(self.settings, self.ledger.url.database or '')}"
        )

    # The following methods describe the state of the service.

    def snapshot(self) -> ProcessSnapshot:
        """The metrics of this process at this instant, including those of attempts that are still
        running.
        """
        items: Counter[str] = Counter()
        dropped = 0
        for attempt in self.engine.attempts:
            dropped += attempt.state.log.dropped
            if (done := attempt.state.loops.done_here) > 0:
                items[attempt.task.name] += done
        return ProcessSnapshot.of(
            self.metrics,
            running_items=items,
            running_dropped=dropped,
            running=self.engine.running,
            leases_lost=self.engine.losses,
            loop_lag=self.node.loop_lag,
        )

    @property
    def warnings(self) -> dict[str, str]:
        """Problems that hold up runs of this process although it is ready, by the name of the
        part.
        """
        return {"threads": crowded} if (crowded := self.engine.crowded) is not None else {}

    async def readiness(self) -> dict[str, str]:
        """The parts that are not ready, each with the reason; empty if this process is ready."""
        failures = self.supervisor.failures
        if self.is_stopping:
            return await reasons_while_stopping(self.application, self.ledger) | failures
        firing = (self.dispatcher, self.schedules) if self._fires else None
        return (
            await reasons(self.application, self.ledger, self.node, self.engine, firing) | failures
        )

    async def _troubles(self) -> dict[str, str]:
        return {} if self.is_stopping else await self.readiness() | self.warnings

    def _is_working(self) -> bool:
        return (
            self._is_firing
            and not self.is_stopping
            and is_working(self.node, self.dispatcher, self.schedules)
        )


def _thresholds(settings: Settings) -> Thresholds:
    return Thresholds(
        late_after=settings.BATCH_ALERT_LATE_AFTER,
        slow_factor=settings.BATCH_ALERT_SLOW_FACTOR,
        node_after=settings.BATCH_ALERT_NODE_AFTER,
        backup_after=settings.BATCH_ALERT_BACKUP_AFTER,
        paused_after=settings.BATCH_ALERT_PAUSED_AFTER,
        repeat=settings.BATCH_ALERT_REPEAT,
    )


class BulkWorker(Background):
    """Carries out bulks: those that were begun here, and those of a process that has died.

    It looks for them when the service starts, when it is woken, and as long as some are in
    progress.
    """

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._woken = asyncio.Event()
        self._woken.set()

    def wake(self) -> None:
        """There may be a bulk to carry out."""
        self._woken.set()

    async def _loop(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            if await self._carry_out_all():
                await asyncio.sleep(BULK_SECONDS)
                self._woken.set()

    async def _carry_out_all(self) -> bool:
        """Carry out all bulks in progress. Returns whether some are left that need another look."""
        from batch_system.operations.bulks import bulk

        context = self._operations.context
        try:
            for id in await bulk.under_way(context):
                await bulk.carry_out(context, id)
            return bool(await bulk.under_way(context))
        except BatchError as error:
            logger.warning(f"a bulk stopped; it goes on in {BULK_SECONDS:g} s: {error.message}")
        except Exception:  # the background loop's boundary
            logger.exception(f"a bulk failed, the next attempt is in {BULK_SECONDS:g} s")
        return True
