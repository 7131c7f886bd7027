"""The heartbeat: a thread in which a node says that it lives, so that a blocked event loop can't stop it.

The thread also reads what has changed in the ledger, hands that to the event loop, and takes over the runs of dead
nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from service import clock
from service.batch.context.lease import MARGIN, Lease, Observer
from service.batch.ledger import database_time, nodes
from service.batch.ledger.nodes import NodeStatus
from service.batch.nodes import ledger_poll, process_lock
from service.batch.nodes.ledger_poll import LOOK_SECONDS, LedgerChanges
from service.batch.nodes.orphans import leave_nothing_running, rescue
from service.database import troubles
from service.database.engine import Database
from service.logs import get_logger

logger = get_logger("service.batch")

LONGEST_TICK = 0.25
LAST_TURN_SECONDS = 2.0


class Heartbeat:
    """Renews the lease of one node. It calls its callbacks on the event loop that started it."""

    row: dict[str, Any]
    """The node's row in the ledger, to be written again if other nodes took this one for dead."""
    trouble: str | None
    """Why the ledger can't be reached, without addresses; None while it can."""

    def __init__(
        self,
        url: str,
        node: str,
        lease: Lease,
        beat_seconds: float,
        lease_seconds: float,
        poll_seconds: float = LOOK_SECONDS,
        fires: bool = True,
    ) -> None:
        """`poll_seconds`: how often it reports that runs may start. All else it reads every second at least.

        `fires=False`: it does not watch other nodes.
        """
        self._fires = fires
        self._url = url
        self._folder = process_lock.folder_of(url)
        self._node = node
        self._lease = lease
        self._observer = Observer(lease_seconds)
        self._beat_seconds = beat_seconds
        self._poll_seconds = poll_seconds
        self._look_seconds = min(LOOK_SECONDS, beat_seconds, poll_seconds)
        self._tick_seconds = min(LONGEST_TICK, self._look_seconds, beat_seconds / 4, lease_seconds * MARGIN / 4)
        self._patience = lease.usable_seconds / 3
        self._beat_at = self._look_at = self._poll_at = -math.inf
        self._has_given_up = self._was_told = False
        self.trouble = None
        self._stopping = threading.Event()
        self._own_loop: asyncio.AbstractEventLoop | None = None
        self._lag = LoopLag()

    def start(
        self,
        on_loss: Callable[[], None],
        on_rescue: Callable[[], None],
        on_changes: Callable[[LedgerChanges], None] = lambda _: None,
    ) -> None:
        self._on_loss, self._on_rescue, self._on_changes = on_loss, on_rescue, on_changes
        self._lag.loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), name="batch-heartbeat", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def fall_silent(self) -> None:
        """Begin no other beat or look; returns at once."""
        self._stopping.set()

    def stop(self) -> None:
        """End the thread; waits for it, so call it off the loop."""
        self.fall_silent()
        if self._own_loop is not None:
            try:
                self._own_loop.call_soon_threadsafe(self._wake.set)
            except RuntimeError:  # it has ended by itself
                return
        self._thread.join(5)

    async def _live(self) -> None:
        """Beats and looks wait for the ledger; that the lease has run out is noticed beside them, tick by tick."""
        self._wake = asyncio.Event()
        self._own_loop = asyncio.get_running_loop()
        client = f"batch/{self._node}/heartbeat"
        database = Database(self._url, setting="LEDGER_URL", pool_size=1, client=client)
        try:
            await self._take_turns(database)
        finally:
            await database.dispose()

    async def _take_turns(self, database: Database) -> None:
        turn = asyncio.create_task(self._turn(database))
        while not self._stopping.is_set():
            self._notice_a_loss()
            if turn.done() and self._is_due():
                turn = asyncio.create_task(self._turn(database))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._tick(turn.done())):
                    await self._wake.wait()
        _, unfinished = await asyncio.wait([turn], timeout=LAST_TURN_SECONDS)
        if unfinished:
            turn.cancel()
            await asyncio.wait([turn])

    def _is_due(self) -> bool:
        return clock.boottime() >= min(self._beat_at, self._look_at)

    def _tick(self, is_idle: bool) -> float:
        """In seconds: until the next turn, if that comes before a whole tick is over."""
        left = min(self._beat_at, self._look_at) - clock.boottime()
        return min(self._tick_seconds, max(0.0, left)) if is_idle else self._tick_seconds

    def _notice_a_loss(self) -> None:
        if self._lease.is_held or self._has_given_up:
            return
        self._has_given_up = True
        logger.error("this node could not renew its lease in time: it gives up its runs, and starts none until it can")
        self._call(self._on_loss)

    async def _turn(self, database: Database) -> None:
        try:
            async with asyncio.timeout(self._patience):
                self._look_at = clock.boottime() + self._look_seconds
                is_due = clock.boottime() >= self._beat_at
                changes = await (self._beat(database) if is_due else self._look(database))
                changes.is_claimable = self._is_to_poll() and changes.is_claimable
                self._call(partial(self._on_changes, changes))
                await self._rescue(database, changes.others)
            self.trouble = None
        except Exception as error:  # noqa: BLE001 - a background loop's boundary: the next beat may do better
            if self.trouble is None:
                logger.warning(f"the heartbeat does not reach the ledger: {database.why(error)}")
            self.trouble = troubles.advice_on(error) or type(error).__name__
            self._beat_at = min(self._beat_at, self._look_at)

    async def _beat(self, database: Database) -> LedgerChanges:
        """Beat, and look in the same transaction."""
        self._notice_a_loss()
        sent_at = clock.boottime()
        self._beat_at = sent_at + self._beat_seconds
        async with database.engine.begin() as connection:
            is_alive = await nodes.beat(connection, self._node, self._lag.take())
            changes = await ledger_poll.read(connection, self._node, self._fires)
        if not is_alive:
            sent_at = await self._come_back(database)
        self._lease.renew(sent_at)
        self._has_given_up = self._was_told = False
        return changes

    async def _come_back(self, database: Database) -> float:
        """Somebody has taken this node for dead. Returns the boot time at which it was sent that it lives.

        It keeps its id: what it does about runs is under their fences, and what it claimed after it was taken for dead
        is found by that id.
        """
        self._lease.end()
        if not self._was_told:
            self._was_told = self._has_given_up = True
            logger.error("this node lost its lease, and others took its runs: it gives them up, and registers anew")
        await self._on_the_loop(self._on_loss)
        sent_at = clock.boottime()
        async with database.engine.begin() as connection:
            now = await database_time.now_of(connection)
            await leave_nothing_running(connection, self._node, now, "its node had lost its lease")
            await nodes.register(connection, {**self.row, "seen_at": now})
        return sent_at

    async def _look(self, database: Database) -> LedgerChanges:
        async with database.reader.connect() as connection:
            return await ledger_poll.read(connection, self._node, self._fires)

    def _is_to_poll(self) -> bool:
        """With each look, or about once in `poll_seconds` where those are more."""
        now = clock.boottime()
        if now < self._poll_at:
            return False
        self._poll_at = now + self._poll_seconds - self._look_seconds / 2
        return True

    async def _rescue(self, database: Database, others: Sequence[NodeStatus]) -> None:
        """Take over the runs of nodes that are silent, and of those of this machine whose processes are gone."""
        silent = self._observer.silent({node.id: node.beats for node in others if not node.is_stopped})
        gone = {node.id for node in others if process_lock.is_gone(self._folder, node.id)}
        dead = {n.id: n.beats for n in others if n.is_stopped or n.id in silent or n.id in gone}
        if dead:
            await self._take_over(database, dead, silent)

    async def _take_over(self, database: Database, dead: Mapping[str, int], silent: set[str]) -> None:
        async with database.engine.begin() as connection:
            if silent:
                seen = {node: dead[node] for node in silent}
                await nodes.end_connections(connection, await nodes.still_as_seen(connection, seen))
            done = await rescue(connection, dead, await database_time.now_of(connection))
        for node in done:
            process_lock.forget(self._folder, node)
        if done:
            self._call(self._on_rescue)

    def _call(self, function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # that loop is closed: nothing runs on it any more
            self._lag.loop.call_soon_threadsafe(function)

    async def _on_the_loop(self, function: Callable[[], None]) -> None:
        """Call it, and return when it has returned."""
        own, done = asyncio.get_running_loop(), asyncio.Event()

        def call() -> None:
            function()
            if not own.is_closed():
                own.call_soon_threadsafe(done.set)

        self._call(call)
        await done.wait()


class LoopLag:
    """How long a callback waits on the event loop, in seconds, as seen from another thread."""

    loop: asyncio.AbstractEventLoop

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._answered = 0.0

    def take(self) -> float:
        """The last answer; while none comes, the time since it was asked for."""
        if self._asked_at is not None:
            return clock.monotonic() - self._asked_at
        self._asked_at = clock.monotonic()
        try:
            self.loop.call_soon_threadsafe(self._answer)
        except RuntimeError:  # the loop is closed
            self._asked_at = None
        return self._answered

    def _answer(self) -> None:
        asked_at, self._asked_at = self._asked_at, None
        if asked_at is not None:
            self._answered = clock.monotonic() - asked_at
