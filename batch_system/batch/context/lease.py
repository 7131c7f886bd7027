"""Leases: how long a node without a beat counts as alive, for itself and for other nodes. No wall
clock is used.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import threading
from collections.abc import Mapping

from batch_system import clock

MARGIN = 1 / 6
"""The share of a lease, at its end, in which a node that can't renew it gives up its runs."""

LOST = "its node could not renew its lease"
"""The reason on the row of a run that was given up because the lease has ended. The run is resumed
later.
"""


class Lease:
    """The lease of this node: it may work on runs while it holds its lease.

    Other nodes count a whole lease from the instant at which they read its last beat. The node
    counts a shorter time, from the instant before it sent that beat, so it gives up its runs before
    other nodes rescue them. The thread of the heartbeat renews the lease. Any thread may read it,
    and other processes on this machine may, by `share`.
    """

    def __init__(self, seconds: float) -> None:
        self.usable_seconds = seconds * (1 - MARGIN)
        self._ends_at = -math.inf
        self._lock = threading.Lock()
        self._shared: SharedLease | None = None

    @property
    def is_held(self) -> bool:
        return clock.boottime() < self._ends_at

    def share(self) -> int:
        """A file descriptor of the memory that another process reads as a SharedLease. It stays
        open as long as this object.

        Raises OSError.
        """
        with self._lock:
            if self._shared is None:
                self._shared = SharedLease(_new_memory())
            self._shared.write(self._ends_at)
            return self._shared.descriptor

    def renew(self, sent_at: float) -> None:
        """Renew the lease from `sent_at`, the boot time (seconds) just before the committed beat
        was sent.
        """
        self._set(sent_at + self.usable_seconds)

    def end(self) -> None:
        """End the lease at once, because another node has marked this one as stopped."""
        self._set(-math.inf)

    def _set(self, ends_at: float) -> None:
        with self._lock:
            self._ends_at = ends_at
            if self._shared is not None:
                self._shared.write(ends_at)


class SharedLease:
    """A lease in eight bytes of shared memory: the boot time until which the lease is held."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor`: that of Lease.share, or a duplicate of it. It is closed with this
        object.
        """
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _SIZE)
        self._value = memoryview(self._memory).cast("d")

    @property
    def is_held(self) -> bool:
        return clock.boottime() < self._value[0]

    def write(self, ends_at: float) -> None:
        """Set the boot time until which the lease is held."""
        self._value[0] = ends_at

    def __del__(self) -> None:
        os.close(self.descriptor)


_SIZE = 8


def _new_memory() -> int:
    """The descriptor of new shared memory, which no other program can find."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("batch-lease")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, _SIZE)
    return descriptor


class Observer:
    """Finds silent nodes by their beat counters and the boot-time clock of this process.

    A node is silent if its counter has not changed for a whole lease. After a time in which the
    ledger could not be read, or in which this process was suspended, each node counts as alive for
    another lease.
    """

    def __init__(self, lease_seconds: float) -> None:
        self._lease = lease_seconds
        self._last_changes: dict[str, tuple[int, float]] = {}
        """The counter of each node, and the boot time at which this value was first read."""
        self._read_at = -math.inf

    def silent(self, beats: Mapping[str, int]) -> set[str]:
        """The ids of the silent nodes. `beats`: the counters that were just read, by id."""
        now = clock.boottime()
        if now - self._read_at > self._lease / 2:
            self._last_changes = {}
        self._read_at = now
        self._last_changes = {
            node: self._last_change(node, counter, now) for node, counter in beats.items()
        }
        return {
            node for node, (_, since) in self._last_changes.items() if now - since >= self._lease
        }

    def _last_change(self, node: str, beats: int, now: float) -> tuple[int, float]:
        before = self._last_changes.get(node)
        return before if before is not None and before[0] == beats else (beats, now)
