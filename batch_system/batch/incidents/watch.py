"""The watch: one node at a time notices what has gone wrong, and writes incidents and the messages
about them.

The ledger poll wakes it. While nothing is wrong and no run is active, it sends no statements to the
ledger.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.firing.unfired import NotFired
from batch_system.batch.incidents import noticing, outages, telling
from batch_system.batch.incidents.checks import CHECK_SECONDS, Checks
from batch_system.batch.incidents.noticing import BLOCKED_SECONDS
from batch_system.batch.incidents.telling import Channels
from batch_system.batch.incidents.watched import Thresholds, WatchedTasks, watched_tasks
from batch_system.batch.ledger import database_time, duties
from batch_system.batch.ledger.duties import WATCH
from batch_system.batch.nodes.clock_steps import AHEAD
from batch_system.batch.nodes.ledger_poll import LedgerChanges
from batch_system.batch.nodes.outage import Outage
from batch_system.concurrency.background import Background
from batch_system.database.engine import Database
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

NEVER = datetime.max.replace(tzinfo=UTC)


class Watch(Background):
    """`node`: the id of this node. `channels`: see telling.Channels. `on_told`: called when
    messages have to be sent.
    """

    def __init__(
        self,
        ledger: Database,
        application: Database,
        node: str,
        thresholds: Thresholds,
        channels: Channels,
        on_told: Callable[[], None],
        outage: Outage,
        on_noticed: Callable[[], None] = lambda: None,
        lease: float = 30.0,
    ) -> None:
        """`on_noticed`: called when the duty was taken, and when slots may have changed. `lease`:
        LEASE_SECONDS.
        """
        self.unfired: Callable[[], NotFired | None] = lambda: None
        """Returns why due slots are not fired by any service; None if there are none."""
        self._longest_lag = lease * duties.SHARE_OF_LEASE
        self._ledger = ledger
        self._node = node
        self._checks = Checks(ledger, application, thresholds, channels)
        self._thresholds = thresholds
        self._channels = channels
        self._on_told = on_told
        self._on_noticed = on_noticed
        self._outage = outage
        self._woken = asyncio.Event()
        self._changes: LedgerChanges | None = None
        self._gap: tuple[datetime, datetime] | None = None
        self._next_check = datetime.min.replace(tzinfo=UTC)
        self._last_check = datetime.min.replace(tzinfo=UTC)
        self._catalog: int | None = None
        self._watched: WatchedTasks | None = None
        self._watched_version: int | None = None
        self._lags: dict[str, float] = {}
        """For how long the event loops of other nodes had stood still at the last check."""
        self.holds = False
        """Whether this node has the duty of the watch, as far as it knows."""

    def on_changes(self, changes: LedgerChanges) -> None:
        """Take the result of a ledger poll, and wake the watch if there is something to do."""
        before = self._changes
        self._changes = changes
        # The ledger's clock was set back.
        if before is not None and changes.now < before.now - AHEAD:
            self._next_check = self._last_check = datetime.min.replace(tzinfo=UTC)
            self._checks.clock_was_set_back()
        if self.holds and before is not None and _passed(before, changes) >= outages.SHORTEST:
            self._gap = self._gap or (before.now, changes.now)
        if self._is_needed(changes) or self._outage.has_failed("watch"):
            self._woken.set()
        if self.holds and changes.is_unsent:
            self._on_told()

    def _is_needed(self, changes: LedgerChanges) -> bool:
        if not self.holds or changes.watcher != self._node:
            self.holds = False
            living = {
                node.id
                for node in changes.others
                if node.fires and not node.is_stopped and node.loop_lag < self._longest_lag
            }
            return changes.watcher not in living
        if changes.is_unnoticed or self._gap is not None or changes.catalog != self._catalog:
            return True
        is_busy = changes.is_active or changes.is_claimable or self.unfired() is not None
        return changes.now >= self._next_check or (
            is_busy and changes.now >= self._last_check + _PAUSE
        )

    async def _loop(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            try:
                await self._turn()
                self._outage.over_for("watch")
            except Exception as error:  # the background loop's boundary
                self._checks.forget_all()
                if self._outage.cause_for("watch", self._ledger, error) is None:
                    logger.exception("the watch failed; it goes on with the next poll")

    async def _turn(self) -> None:
        if not self.holds:
            async with self.limited_turn():
                if not await self._take():
                    return
        # Ask before noticing missed slots, because slots missed meanwhile belong to this incident.
        unfired = self.unfired()
        is_done = False
        while not is_done:
            async with self.limited_turn():
                is_done = not await self._notice()
        if self.holds:
            async with self.limited_turn():
                await self._check(unfired)

    async def _take(self) -> bool:
        async with self._ledger.engine.begin() as connection:
            now = await database_time.now_of(connection)
            is_first = await duties.holder(connection, WATCH) is None
            self.holds = await duties.take_from_the_dead(
                connection, WATCH, self._node, now, self._longest_lag
            )
            outage = await outages.before_node(connection, self._node) if self.holds else None
            # Nothing is sent about the time before the first watch of this ledger, such as an
            # upgrade.
            if outage is not None:
                await outages.record(connection, *outage, now, is_silent=is_first)
        self._next_check = self._last_check = datetime.min.replace(tzinfo=UTC)
        self._gap = None
        if self.holds:
            self._checks.forget_all()
            self._on_told()  # the node before this one may have left some messages
            self._on_noticed()
        return self.holds

    async def _notice(self) -> bool:
        """Notice some of the new rows. Returns whether there may be more."""
        async with self._ledger.engine.begin() as connection:
            if not await self._still_holds(connection):
                return False
            now = await database_time.now_of(connection)
            gap = self._gap
            noticed = await self._notice_rows(connection, gap, now)
            if noticed or gap is not None:
                await telling.tell(
                    connection, await self._watched_tasks(connection), self._channels, now
                )
        self._gap = None
        if noticed:
            self._next_check = now
            self._on_told()
            self._on_noticed()
        return noticed >= _MANY

    async def _notice_rows(
        self, connection: AsyncConnection, gap: tuple[datetime, datetime] | None, now: datetime
    ) -> int:
        """Notice new rows: first runs, because their rows are locked before those of incidents;
        then an outage, because the missed ranges in it belong to its incident.
        """
        noticed, tasks = await noticing.notice_runs(connection, now)
        self._checks.forget(tasks)
        if gap is not None and not await outages.is_known(connection, *gap):
            known = self._outage.during(*gap)
            # The outage may reach further than the two polls, and so may its missed slots.
            if known is not None:
                gap = min(known.since, gap[0]), max(known.until, gap[1])
            await outages.record(
                connection, *gap, now, cause=known.cause if known is not None else None
            )
        noticed += await noticing.notice_ranges(connection, self._outage, now)
        noticed += await noticing.notice_nodes(connection, now, self._thresholds.patience)
        return noticed + await noticing.notice_backups(connection, now)

    async def _check(self, unfired: NotFired | None) -> None:
        changes = self._changes
        self._catalog = changes.catalog if changes is not None else None
        redriven = await self._checks.redriven()
        async with self._ledger.reader.connect() as connection:
            now = await database_time.now_of(connection)
            findings = await self._checks.look(
                connection,
                await self._watched_tasks(connection),
                redriven,
                now,
                unfired,
                self._blocked(changes),
                is_doubtful=self._outage.cause is not None,
            )
        following = [findings.next_at] if findings.next_at is not None else []
        number = len(findings.opened)
        if not findings.are_none:
            async with self._ledger.engine.begin() as connection:
                if not await self._still_holds(connection):
                    return
                written = await self._checks.write(connection, findings, now)
            number = written.open
            if findings.deadlines:
                self._watched = None
            following += [written.held_until] if written.held_until is not None else []
            if written.has_told:
                self._on_told()
        if number:
            following.append(now + _PAUSE)
        self._last_check = now
        self._next_check = min(following, default=NEVER)

    def _blocked(self, changes: LedgerChanges | None) -> dict[str, bool]:
        """The other nodes whose event loop stands still, each with whether that is certain.

        It is certain if the lag has grown since the last check: a node that was frozen reports such
        a lag only once, in its first beat.
        """
        before = self._lags
        self._lags = {node.id: node.loop_lag for node in changes.others} if changes else {}
        return {
            id: BLOCKED_SECONDS / 2 < before.get(id, 0.0) < lag
            for id, lag in self._lags.items()
            if lag >= BLOCKED_SECONDS
        }

    async def _watched_tasks(self, connection: AsyncConnection) -> WatchedTasks:
        """All tasks. They are read again when a task or a schedule has changed, or deadlines were
        checked.
        """
        version = self._changes.catalog if self._changes is not None else None
        if self._watched is None or version != self._watched_version:
            self._watched = await watched_tasks(connection)
            self._watched_version = version
        return self._watched

    async def _still_holds(self, connection: AsyncConnection) -> bool:
        self.holds = await duties.hold(connection, WATCH, self._node)
        return self.holds


def _passed(before: LedgerChanges, after: LedgerChanges) -> timedelta:
    """How much time has passed between two polls. A step of the clock does not count as
    downtime.
    """
    by_clock = after.now - before.now
    return (
        by_clock
        if clock.is_moved()
        else min(by_clock, timedelta(seconds=after.read_at - before.read_at))
    )


_PAUSE = timedelta(seconds=CHECK_SECONDS)
_MANY = 500
