"""Slots that are about to come: when the work for them begins, which for many of one instant is
before that instant.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from datetime import datetime

from service import clock

FEW = 20
"""So many slots of one instant are fired when they are due: that takes some milliseconds, and holds
no lock before.
"""

BASE_SECONDS = 0.01
LONGEST_SECONDS = 1.5
"""How long before an instant the work for its slots may begin at most. Nobody else writes to SQLite
in this time.
"""
SHARE_OF_LEASE = 0.1
"""That is at most this part of a lease, which the heartbeat has to renew meanwhile."""
BETWEEN_SECONDS = 0.05
"""How long after an instant with other slots the work for later ones begins at the earliest."""
LOOK_SECONDS = 0.5
"""How often the clock is looked at while slots are still to come: it may be set, and the machine
may be suspended.
"""


class ComingSlots:
    """Collects slots until the work for them has to begin, and then calls `begin`."""

    def __init__(
        self, begin: Callable[[Collection[str], datetime | None], None], lease: float = 30.0
    ) -> None:
        """`begin` is called with the names of tasks, and with the instant of their slots if that is
        still to come.

        `lease`: LEASE_SECONDS.
        """
        self._begin = begin
        self._longest = min(LONGEST_SECONDS, SHARE_OF_LEASE * lease)
        self._names_by_slot: dict[datetime, set[str]] = {}
        self._coming: set[datetime] = set()
        """The instants of which the work has not begun."""
        self._seconds_each = 0.0001

    def add(self, name: str, slot: datetime) -> None:
        """A slot of this task is due at `slot`. What is added in the same step of the event loop is
        fired together.
        """
        if slot not in self._names_by_slot:
            self._names_by_slot[slot] = set()
            self._coming.add(slot)
            asyncio.get_running_loop().call_soon(self._plan, slot)
        self._names_by_slot[slot].add(name)

    def begin_when_due(self, names: Collection[str], slot: datetime) -> None:
        """Have the work for these tasks begin at `slot`, by the clock of this machine."""
        self._begin_at(slot, 0.0, names)

    def measured(self, number: int, seconds: float) -> None:
        """The work for this many slots has taken this long. This decides when it begins the next
        time.
        """
        self._seconds_each = max(seconds / number, 0.8 * self._seconds_each)

    def _plan(self, slot: datetime) -> None:
        names = self._names_by_slot.pop(slot)
        lead = (
            0.0
            if len(names) <= FEW
            else min(self._longest, BASE_SECONDS + len(names) * self._seconds_each)
        )
        if before := max((other for other in self._coming if other < slot), default=None):
            lead = max(0.0, min(lead, (slot - before).total_seconds() - BETWEEN_SECONDS))
        self._begin_at(slot, lead, names)

    def _begin_at(self, slot: datetime, lead: float, names: Collection[str]) -> None:
        wait = (slot - clock.now()).total_seconds()
        if wait > lead:
            asyncio.get_running_loop().call_later(
                min(wait - lead, LOOK_SECONDS), self._begin_at, slot, lead, names
            )
        else:
            self._coming.discard(slot)
            self._begin(names, slot if lead and wait > 0 else None)
