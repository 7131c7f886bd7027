"""The heartbeat: a thread that keeps a node alive in the ledger, even while the event loop is
blocked.

The thread also polls the ledger for changes, passes them to the event loop, and rescues the runs of
dead nodes. It polls at once when another process notifies it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError

from batch_system import clock, tracing
from batch_system.batch.context.lease import MARGIN, Lease, Observer
from batch_system.batch.ledger import database_time, nodes
from batch_system.batch.ledger.nodes import NodeStatus
from batch_system.batch.ledger.people import node_events
from batch_system.batch.ledger.wakes import ONLY_BY_POLLS, Wake
from batch_system.batch.nodes import ledger_poll, process_lock
from batch_system.batch.nodes.file_watch import FileWatch
from batch_system.batch.nodes.harm import LostLease
from batch_system.batch.nodes.ledger_poll import LOOK_SECONDS, LedgerChanges
from batch_system.batch.nodes.orphans import interrupt_runs_of, rescue
from batch_system.batch.nodes.outage import Outage
from batch_system.batch.nodes.roles import SERVICE, Roles
from batch_system.concurrency.background import Turn
from batch_system.concurrency.limits import limited
from batch_system.database import lock_holder, pooler, troubles
from batch_system.database.engine import Database, plan_anew
from batch_system.database.open_file import OpenFile
from batch_system.errors import DatabaseError, DatabaseTooNew
from batch_system.logs import get_logger
from batch_system.metrics.process import LedgerWork, ProcessMetrics

if TYPE_CHECKING:
    from batch_system.batch.nodes.listener import Listener

logger = get_logger("batch_system.batch")

OnFatal = Callable[[str, str], None]

LONGEST_TICK = 0.25
"""The longest time between two checks of the lease, in seconds."""
AGAIN_SECONDS = 1.0
"""The seconds until a heartbeat that has failed begins again."""
SLEPT_SECONDS = 5.0
"""If the machine has slept for longer since the last turn, the sleep is the reason why the lease
was lost.
"""
LAST_TURN_SECONDS = 2.0
"""How long a beat in progress may still take when the heartbeat is stopped."""
SHORTEST_PAUSE = 0.02
"""The least number of seconds between two wakes. Notifications in between become one wake, so that
a flood of them does not cause a flood of polls.
"""


class Heartbeat:
    """Renews the lease of one node. It calls its callbacks on the event loop that started it."""

    row: dict[str, Any]
    """The node's row in the ledger. It is written again if another node has marked this one as
    stopped.
    """
    name = "heartbeat"
    turn: Turn | None = None
    """The turn in progress; None between turns."""
    trouble: str | None = None
    """Why the ledger can't be reached, without addresses; None while it can."""
    files: Mapping[str, OpenFile] = MappingProxyType({})
    """The SQLite files that this process uses, by the name of the database: `ledger`,
    `application`.
    """
    replaced: Mapping[str, str] = MappingProxyType({})
    """The deleted or replaced ones of these files, each with a description."""
    troubles: Mapping[str, str] = MappingProxyType({})
    """The troubles of this node, by part. The next beat writes them if they have changed."""
    ping: Mapping[str, str] = MappingProxyType({})
    """What its calls of the dead man's switch came to, as the column of its row has it. So is it
    written.
    """
    _written: Mapping[str, Mapping[str, str]] = nodes.NO_NEWS
    _has_given_up = False
    _has_reported_loss = False
    _severed_at: float | None = None
    """The boot time at which this node cut off its connections; None once the server has ended what
    remained of them.
    """
    _trouble_at: float | None = None
    _holder: int | None = None
    """The process that holds the write lock of the ledger's file, as found since the last
    success.
    """
    _file: str | None = None
    """The ledger's file; None on PostgreSQL."""
    _is_gone = False
    """Whether a turn since the last success has found that the ledger is gone."""
    _own_loop: asyncio.AbstractEventLoop | None = None

    def __init__(
        self,
        url: str,
        node: str,
        lease: Lease,
        beat_seconds: float,
        lease_seconds: float,
        poll_seconds: float = LOOK_SECONDS,
        roles: Roles = SERVICE,
        outage: Outage | None = None,
        setting: str = "LEDGER_URL",
        metrics: ProcessMetrics | None = None,
        pooler_mode: pooler.Pooler | None = None,
    ) -> None:
        """`poll_seconds`: how often it reports that runs can start. It reports other changes at
        least once a second.

        `lease_seconds`: how long another node may be silent before it counts as dead. Only a node
        that fires watches other nodes.
        """
        self._roles = roles
        self._metrics = metrics or ProcessMetrics()
        self._url = url
        self._setting = setting
        self._pooler = pooler_mode
        self._outage = outage or Outage()
        self._folder = process_lock.folder_of(url)
        self._node = node
        self._lease = lease
        self._observer = Observer(lease_seconds)
        self._unrescued: set[str] = set()
        """The dead nodes that held runs in the last turn."""
        self._neighbours: list[str] = []
        """The other nodes of this machine, as of the last poll."""
        self._beat_seconds = beat_seconds
        self._poll_seconds = poll_seconds
        self._look_seconds = min(LOOK_SECONDS, beat_seconds, poll_seconds)
        self._tick_seconds = min(
            LONGEST_TICK, self._look_seconds, beat_seconds / 4, lease_seconds * MARGIN / 4
        )
        self._patience = lease.usable_seconds / 3
        self._beat_at = self._look_at = self._poll_at = -math.inf
        self.on_fatal: OnFatal = lambda name, reason: None
        """Called in this thread with the name of a database, or of this part, and the reason why
        this process can't go on.
        """
        self.on_damage: Callable[[str], None] = lambda cause: None
        """Called in this thread with the cause when SQLite finds that the ledger is damaged."""
        self._worked_at = clock.boottime()
        self._awake_at = clock.monotonic()
        """When the last turn succeeded: by the boot-time clock, and by the clock that stops during
        a suspend.
        """
        self._stopping = threading.Event()
        self.on_end: Callable[[BaseException], None] = lambda _: None
        """Called in the thread if it ends without being stopped."""
        self._lag = LoopLag()

    def start(
        self,
        on_loss: Callable[[LostLease | None], None],
        on_rescue: Callable[[], None],
        on_changes: Callable[[LedgerChanges], None] = lambda _: None,
        on_queued: Callable[[frozenset[str] | None], None] = lambda _: None,
        on_replaced: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the thread. The callbacks are described in Node.start; they are called on the
        running event loop.
        """
        self._on_loss = on_loss
        self._on_rescue = on_rescue
        self._on_changes = on_changes
        self._on_queued = on_queued
        self._on_replaced = on_replaced
        self._lag.loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._serve, name="batch-heartbeat", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def loop_lag(self) -> float:
        """How many seconds the last callback waited on the event loop."""
        return self._lag.last

    def fall_silent(self) -> None:
        """Begin no further beat or poll. Returns at once."""
        self._stopping.set()

    def stop(self) -> None:
        """End the thread and wait for it, up to 5 seconds. It blocks, so call it outside the thread
        of the event loop.
        """
        self.fall_silent()
        if self._own_loop is not None:
            with contextlib.suppress(RuntimeError):  # the thread's own loop has ended by itself
                self._own_loop.call_soon_threadsafe(self._wake.set)
        self._thread.join(5)

    def _serve(self) -> None:
        """Run the heartbeat until it is stopped, and restart it after errors, because a node
        without beats is useless.
        """
        while not self._stopping.is_set():
            try:
                asyncio.run(self._live())
            except Exception:
                logger.exception("the heartbeat has failed, and restarts")
                self._give_up_if_lease_ended()
                self._stopping.wait(AGAIN_SECONDS)
            except BaseException as error:
                self.on_end(error)
                raise

    def stack(self) -> str:
        """Where the thread is now, as the lines of a traceback."""
        return "".join(traceback.format_stack(sys._current_frames().get(self._thread.ident or 0)))

    async def _live(self) -> None:
        """Beat and poll until the heartbeat is stopped, and check at each tick whether the lease
        has ended.

        That check goes on while a beat or poll waits for the ledger.
        """
        self._wake = asyncio.Event()
        self._own_loop = asyncio.get_running_loop()
        client = f"batch/{self._node}/heartbeat"
        database = Database(
            self._url,
            setting=self._setting,
            pool_size=1,
            client=client,
            plans_once=True,
            waits_briefly=True,
            pooler=self._pooler,
        )
        database.on_damage = self.on_damage
        self._file = database.url.database if database.kind == "sqlite" else None
        wakes = Wakes(database, self._node, self._on_wake)
        try:
            with tracing.suppressed():
                await self._take_turns(database)
        finally:
            await wakes.stop()
            await database.dispose()

    async def _take_turns(self, database: Database) -> None:
        turn = asyncio.create_task(self._turn(database))
        while not self._stopping.is_set():
            self._give_up_if_lease_ended()
            if turn.done() and (self._is_due() or self._has_neighbour_died()):
                turn = asyncio.create_task(self._turn(database))
                # A notification that came during the turn is handled next.
                turn.add_done_callback(lambda _: self._wake.set())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._tick(turn.done())):
                    await self._wake.wait()
            self._wake.clear()
        _, unfinished = await asyncio.wait([turn], timeout=LAST_TURN_SECONDS)
        if unfinished:
            turn.cancel()
            await asyncio.wait([turn])

    def _on_wake(self, wake: Wake) -> None:
        """Take a notification of another process, on the heartbeat's own event loop."""
        if wake.pools is None or wake.pools:
            self._call(partial(self._on_queued, wake.pools))
        if wake.asks:
            self._look_at = -math.inf
            self._wake.set()

    def _is_due(self) -> bool:
        return clock.boottime() >= min(self._beat_at, self._look_at)

    def _has_neighbour_died(self) -> bool:
        """Whether the process of another node of this machine has ended. This does not use the
        ledger.
        """
        return any(process_lock.is_gone(self._folder, node) for node in self._neighbours)

    def _tick(self, is_idle: bool) -> float:
        """How many seconds to wait: a tick, or less if the next turn is due before."""
        until_turn = min(self._beat_at, self._look_at) - clock.boottime()
        return min(self._tick_seconds, max(0.0, until_turn)) if is_idle else self._tick_seconds

    def _give_up_if_lease_ended(self) -> None:
        if self._lease.is_held or self._has_given_up:
            return
        self._has_given_up = True
        logger.error(
            "this node could not renew its lease in time; it gives up its runs, and starts none "
            "until it can"
        )
        self._severed_at = clock.boottime()
        self._call(partial(self._on_loss, self._how_lost()))

    def _how_lost(self) -> LostLease | None:
        """How the lease was lost; None if no run can be the cause.

        No run is the cause if the ledger was gone, if another process has its lock, or if the
        machine slept.
        """
        if self.turn is not None:  # it waits for the ledger, and has not failed yet
            self._find_holder()
        slept = (clock.boottime() - self._worked_at) - (clock.monotonic() - self._awake_at)
        if self._is_gone or slept > SLEPT_SECONDS or self._holder not in (None, os.getpid()):
            return None
        since = self._worked_at if self._trouble_at is None else self._trouble_at
        if self._holder is not None:
            seconds = clock.boottime() - since
            return LostLease(
                f"its process held the ledger's lock for {seconds:.0f} s while it ran", since, True
            )
        return LostLease("its node could not reach the ledger while it ran", since)

    def _find_holder(self) -> None:
        """Remember which process holds the write lock of the ledger's file now."""
        if self._file is not None:
            self._holder = lock_holder.of_write_lock(self._file) or self._holder

    async def _turn(self, database: Database) -> None:
        began_at = clock.boottime()
        look_at = self._look_at = began_at + self._look_seconds
        self.turn = Turn(self._patience)
        try:
            self._refuse_replaced_files()
            async with limited(self._patience):
                # With trouble, the beat may be waiting for a lock that a frozen node holds on this
                # node's row.
                if self.trouble is not None or self._has_neighbour_died():
                    await self._rescue(database, (await self._look(database)).others)
                is_due = clock.boottime() >= self._beat_at
                changes = await (self._beat(database) if is_due else self._look(database))
                changes.is_claimable = self._may_report_claimable() and changes.is_claimable
                self._call(partial(self._on_changes, changes))
                await self._rescue(database, changes.others)
                await self._tidy_up(database)
            self.trouble = self._trouble_at = self._holder = None
            self._is_gone = False
            self._worked_at = clock.boottime()
            self._awake_at = clock.monotonic()
            self._outage.over_for("heartbeat")
        except DatabaseTooNew as error:  # no later beat can succeed
            self._lease.end()
            self._give_up_if_lease_ended()
            self.trouble = error.message
            self.on_fatal(self.name, error.message)
        except Exception as error:  # the boundary of a background loop: the next beat may succeed
            if self._outage.cause_for("heartbeat", database, error) is None:
                logger.exception("the heartbeat has failed, the next attempt is in a second")
            self.trouble = troubles.advice_on(error) or type(error).__name__
            self._trouble_at = began_at if self._trouble_at is None else self._trouble_at
            self._find_holder()
            self._is_gone |= not troubles.is_busy(error, database.kind)
            self._beat_at = self._look_at = look_at
            # The next poll finds them again. Until then there is no more than one turn a second.
            self._neighbours = []
            if troubles.is_read_only(error):
                self._call(self._on_replaced)
            elif troubles.sqlstate_of(error) == troubles.LOCKED:
                await self._beat_only(database)
        finally:
            self.turn = None

    async def _beat_only(self, database: Database) -> None:
        """Keep the lease while another transaction locks what a poll reads: no other node can take
        over this node's runs then.
        """
        # The turn before has reported these errors already.
        with contextlib.suppress(DBAPIError, DatabaseError, OSError):
            async with limited(self._patience):
                sent_at = clock.boottime()
                async with database.engine.begin() as connection:
                    is_alive = await nodes.beat(connection, self._node, self._lag.take())
                if is_alive:
                    self._lease.renew(sent_at)

    async def _tidy_up(self, database: Database) -> None:
        """End what cut-off connections have left on the server, and record outages that have
        ended.
        """
        if self._severed_at is not None:
            async with database.engine.begin() as connection:
                age = clock.boottime() - self._severed_at
                await nodes.end_connections(connection, [self._node], older_than=age, wait=0)
            self._severed_at = None
        if unwritten := self._outage.unwritten():
            async with database.engine.begin() as connection:
                await node_events.record_outages(connection, self.row, unwritten)
            self._outage.are_written(unwritten)

    def _refuse_replaced_files(self) -> None:
        """Raises DatabaseError if a file of SQLite was deleted or replaced, because writes to the
        old file are lost.

        Nothing is fired or started from then on. If the next turn finds the same, the process can't
        go on.
        """
        before = self.replaced
        self.replaced = {name: why for name, file in self.files.items() if (why := file.trouble)}
        for name, why in self.replaced.items():
            if name in before:
                self.on_fatal(name, why)
        if self.replaced:
            self._lease.end()
            self._has_given_up = True
            self._call(partial(self._on_loss, None))
            raise DatabaseError("; ".join(self.replaced.values()))

    async def _beat(self, database: Database) -> LedgerChanges:
        """Beat, and poll in the same transaction."""
        self._give_up_if_lease_ended()
        sent_at = clock.boottime()
        self._beat_at = sent_at + self._beat_seconds
        told = {"troubles": self.troubles, "ping": self.ping}
        news = {name: its for name, its in told.items() if its != self._written.get(name, {})}
        async with self._metrics.timed(LedgerWork.BEAT), database.engine.begin() as connection:
            is_alive = await nodes.beat(connection, self._node, self._lag.take(), news)
            changes = await ledger_poll.read(connection, self._node, self._roles)
        if is_alive:
            self._written = told
        else:
            sent_at = await self._come_back(database)
        self._lease.renew(sent_at)
        self._has_given_up = self._has_reported_loss = False
        return changes

    async def _come_back(self, database: Database) -> float:
        """Register this node again, because another node has marked it as stopped.

        Returns the boot time just before the new row was sent. The node keeps its id: fences
        protect its writes about runs, and the id finds runs that it claimed after it was marked as
        stopped.
        """
        self._lease.end()
        if not self._has_reported_loss:
            self._has_reported_loss = self._has_given_up = True
            logger.error(
                "this node lost its lease, and other nodes took its runs; it gives them up, and "
                "registers again"
            )
        # The node that rescued the runs has counted the loss for them.
        await self._call_and_wait(partial(self._on_loss, None))
        sent_at = clock.boottime()
        async with database.engine.begin() as connection:
            await plan_anew(connection)
            now = await database_time.now_of(connection)
            await interrupt_runs_of(connection, self._node, now, "its node had lost its lease")
            await nodes.register(connection, {**self.row, "seen_at": now})
        return sent_at

    async def _look(self, database: Database) -> LedgerChanges:
        async with self._metrics.timed(LedgerWork.POLL), database.reader.connect() as connection:
            return await ledger_poll.read(connection, self._node, self._roles)

    def _may_report_claimable(self) -> bool:
        """Whether this poll may report that runs can start, which is about once in
        `poll_seconds`.
        """
        now = clock.boottime()
        if now < self._poll_at:
            return False
        self._poll_at = now + self._poll_seconds - self._look_seconds / 2
        return True

    async def _rescue(self, database: Database, others: Sequence[NodeStatus]) -> None:
        """Rescue the runs of nodes that are stopped or silent, and of nodes of this machine whose
        process has ended.
        """
        silent = self._observer.silent(
            {node.id: node.beats for node in others if not node.is_stopped}
        )
        self._neighbours = [
            node.id for node in others if process_lock.has_file(self._folder, node.id)
        ]
        ended = {node for node in self._neighbours if process_lock.is_gone(self._folder, node)}
        dead = {n.id: n.beats for n in others if n.is_stopped or n.id in silent or n.id in ended}
        if dead:
            await self._take_over(database, dead, silent)
        else:
            self._unrescued = set()

    async def _take_over(
        self, database: Database, dead: Mapping[str, int], silent: set[str]
    ) -> None:
        if database.kind == "sqlite":
            for node in silent:
                process_lock.end_if_frozen(self._folder, node, database.url.database or "")
        async with database.engine.begin() as connection:
            await plan_anew(connection)
            if held := {
                node: dead[node] for node in dead if node in silent or node in self._unrescued
            }:
                await nodes.end_connections(
                    connection, await nodes.with_same_beats(connection, held)
                )
            rescued = await rescue(connection, dead, await database_time.now_of(connection))
        # Rows locked by another transaction were left out. If it belongs to the dead node itself,
        # the next turn ends it.
        self._unrescued = set(dead)
        for node in rescued:
            process_lock.remove_if_gone(self._folder, node)
        if rescued:
            self._call(self._on_rescue)

    def _call(self, function: Callable[[], None]) -> None:
        # A RuntimeError means that the node's event loop is closed: nothing runs on it any more.
        with contextlib.suppress(RuntimeError):
            self._lag.loop.call_soon_threadsafe(function)

    async def _call_and_wait(self, function: Callable[[], None]) -> None:
        """Call `function` on the node's event loop, and wait until it has returned."""
        own_loop, has_returned = asyncio.get_running_loop(), asyncio.Event()

        def call() -> None:
            function()
            if not own_loop.is_closed():
                own_loop.call_soon_threadsafe(has_returned.set)

        self._call(call)
        await has_returned.wait()


class Wakes:
    """Receives the notifications of the ledger's other processes, on the event loop of `database`.
    The next poll finds what was missed.
    """

    def __init__(self, database: Database, node: str, on_wake: Callable[[Wake], None]) -> None:
        """`database`: has one connection, which stays open, and is used only after this. `on_wake`:
        called at once with the first notification, then at most once in SHORTEST_PAUSE.
        """
        self._on_wake = on_wake
        self._kept = Wake()
        self._pause: asyncio.TimerHandle | None = None
        self._source: FileWatch | Listener | None = None
        if database.kind == "sqlite":
            self._source = FileWatch(database, self._hear)
        elif database.pooler is not None:
            logger.info(
                f"{database.safe_url} ({database.setting}) is behind a pooler "
                f"({pooler.SETTING}): {ONLY_BY_POLLS}"
            )
        elif database.url.drivername == "postgresql+asyncpg":
            from batch_system.batch.nodes.listener import (
                Listener,  # it needs the driver of PostgreSQL
            )

            self._source = Listener(database, node, self._hear)

    async def stop(self) -> None:
        """Take no more notifications."""
        if self._pause is not None:
            self._pause.cancel()
        if self._source is not None:
            await self._source.stop()

    def _hear(self, wake: Wake) -> None:
        if wake == Wake():
            return
        if self._pause is not None:
            self._kept |= wake
            return
        self._pause = asyncio.get_running_loop().call_later(SHORTEST_PAUSE, self._go_on)
        self._on_wake(wake)

    def _go_on(self) -> None:
        kept = self._kept
        self._kept = Wake()
        self._pause = None
        self._hear(kept)


class LoopLag:
    """How many seconds a callback waits on the event loop, measured from another thread. `last`:
    the lag of the last callback.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(self) -> None:
        self._scheduled_at: float | None = None
        self.last = 0.0

    def take(self) -> float:
        """Schedule a callback, and return the lag of the last one, or how long it has waited if it
        has not run yet.
        """
        if self._scheduled_at is not None:
            return clock.monotonic() - self._scheduled_at
        self._scheduled_at = clock.monotonic()
        try:
            self.loop.call_soon_threadsafe(self._measure)
        except RuntimeError:  # the loop is closed
            self._scheduled_at = None
        return self.last

    def _measure(self) -> None:
        scheduled_at = self._scheduled_at
        self._scheduled_at = None
        if scheduled_at is not None:
            self.last = clock.monotonic() - scheduled_at
