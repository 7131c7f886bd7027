"""Leases: how long a silent node counts as alive, for itself and for those that watch it. No wall clock takes part."""

from __future__ import annotations

import math
from collections.abc import Mapping

from service import clock

MARGIN = 1 / 6
"""The share of a lease, at its end, in which a node that can't renew it gives up its runs."""

LOST = "its node could not renew its lease"
"""Why a run is given up then, and resumed: the reason on its row."""


class Lease:
    """This node's own. It may work on runs while it holds it.

    Others count a whole lease from when they saw its last beat. The node counts from before it sent that, and less by
    the margin: so its runs are given up before anybody takes them. The heartbeat's thread writes it, all may read it.
    """

    def __init__(self, seconds: float) -> None:
        self.usable_seconds = seconds * (1 - MARGIN)
        self._ends_at = -math.inf

    @property
    def is_held(self) -> bool:
        return clock.boottime() < self._ends_at

    def renew(self, sent_at: float) -> None:
        """A beat that was sent at `sent_at` (boot time) is in the ledger."""
        self._ends_at = sent_at + self.usable_seconds

    def end(self) -> None:
        """Others have taken this node for dead."""
        self._ends_at = -math.inf


class Observer:
    """Which nodes are silent, judged by their counters on this process's own boot-time clock.

    A node is silent when its counter was seen unchanged for a whole lease. While the ledger could not be read, or this
    process was suspended, nobody was watched: after such a gap everybody counts as alive anew.
    """

    def __init__(self, lease_seconds: float) -> None:
        self._lease = lease_seconds
        self._seen: dict[str, tuple[int, float]] = {}
        self._looked_at = -math.inf

    def silent(self, beats: Mapping[str, int]) -> set[str]:
        """Take in the counters that were just read, by node; returns the nodes among them that are silent."""
        now = clock.boottime()
        if now - self._looked_at > self._lease / 2:
            self._seen = {}
        self._looked_at = now
        self._seen = {node: self._sight(node, counter, now) for node, counter in beats.items()}
        return {node for node, (_, since) in self._seen.items() if now - since >= self._lease}

    def _sight(self, node: str, beats: int, now: float) -> tuple[int, float]:
        before = self._seen.get(node)
        return before if before is not None and before[0] == beats else (beats, now)
