"""Leases: how long a node without a beat counts as alive, for itself and for other nodes. No wall clock is used."""

from __future__ import annotations

import math
from collections.abc import Mapping

from service import clock

MARGIN = 1 / 6
"""The share of a lease, at its end, in which a node that can't renew it gives up its runs."""

LOST = "its node could not renew its lease"
"""The reason on the row of a run that was given up because the lease has ended. The run is resumed later."""


class Lease:
    """The lease of this node: it may work on runs while it holds its lease.

    Other nodes count a whole lease from the instant at which they read its last beat. The node counts from the instant
    before it sent that beat, and a shorter time: so it gives up its runs before other nodes rescue them. The thread of
    the heartbeat renews the lease; any thread may read it.
    """

    def __init__(self, seconds: float) -> None:
        self.usable_seconds = seconds * (1 - MARGIN)
        self._ends_at = -math.inf

    @property
    def is_held(self) -> bool:
        return clock.boottime() < self._ends_at

    def renew(self, sent_at: float) -> None:
        """Renew the lease from `sent_at`, the boot time (seconds) just before the committed beat was sent."""
        self._ends_at = sent_at + self.usable_seconds

    def end(self) -> None:
        """End the lease at once, because another node has marked this one as stopped."""
        self._ends_at = -math.inf


class Observer:
    """Finds the nodes that are silent, by their counters of beats and the boot-time clock of this process.

    A node is silent if its counter has not changed for a whole lease. After a time in which the ledger could not be
    read, or in which this process was suspended, each node counts as alive for another lease.
    """

    def __init__(self, lease_seconds: float) -> None:
        self._lease = lease_seconds
        self._last_changes: dict[str, tuple[int, float]] = {}
        """The counter of each node, and the boot time at which it was first read with this value."""
        self._read_at = -math.inf

    def silent(self, beats: Mapping[str, int]) -> set[str]:
        """The ids of the silent nodes. `beats`: the counters that were just read, by id."""
        now = clock.boottime()
        if now - self._read_at > self._lease / 2:
            self._last_changes = {}
        self._read_at = now
        self._last_changes = {node: self._last_change(node, counter, now) for node, counter in beats.items()}
        return {node for node, (_, since) in self._last_changes.items() if now - since >= self._lease}

    def _last_change(self, node: str, beats: int, now: float) -> tuple[int, float]:
        before = self._last_changes.get(node)
        return before if before is not None and before[0] == beats else (beats, now)
