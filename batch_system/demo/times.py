"""When the story happens: its end, its parts, and the services that ran meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta


def at(text: str) -> datetime:
    """An instant of 2026, in UTC: "10-24 20:48" or "10-24 20:48:04.5"."""
    return datetime.fromisoformat(f"2026-{text}").replace(tzinfo=UTC)


NOW = at("10-25 06:42")
"""The end of the story: 07:42 in Berlin, on the Sunday on which the clocks went back at 03:00."""
LONG_AGO = at("07-28 08:00")
"""The ledger begins, with the tasks that run seldom."""
FORTNIGHT = at("10-11 04:00")
"""All other tasks come."""
EVENING = at("10-24 16:00")
"""The night begins: Saturday, 18:00 in Berlin."""
SHORTLY = timedelta(milliseconds=400)


@dataclass(frozen=True)
class Service:
    """One process of the service. `end`: None if it still runs. `is_lost`: it did not stop by
    itself.
    """

    host: str
    pid: int
    application: str
    start: datetime
    end: datetime | None
    is_lost: bool = False

    def is_up(self, begin: datetime, end: datetime) -> bool:
        """Whether it runs from `begin` to `end`."""
        return self.start < begin and (self.end is None or end < self.end)


SERVICES: Sequence[Service] = (
    Service("node-a", 3170, "2.13.2", LONG_AGO, at("10-13 12:05")),
    Service("node-b", 3204, "2.13.2", LONG_AGO + timedelta(seconds=3), at("10-13 12:07")),
    Service("node-a", 3861, "2.14.0", at("10-13 12:05:04"), at("10-17 22:14:09"), is_lost=True),
    Service("node-b", 3902, "2.14.0", at("10-13 12:07:03"), at("10-17 22:14:08"), is_lost=True),
    Service("node-a", 811, "2.14.0", at("10-17 22:31:40"), at("10-24 20:48")),
    Service("node-b", 798, "2.14.0", at("10-17 22:31:44"), at("10-24 20:50")),
    Service("node-a", 4127, "2.14.1", at("10-24 20:48:04"), at("10-25 02:10:20"), is_lost=True),
    Service("node-b", 4215, "2.14.1", at("10-24 20:50:02"), at("10-25 02:10:19"), is_lost=True),
    Service("node-a", 805, "2.14.1", at("10-25 02:31:04"), None),
    Service("node-b", 793, "2.14.1", at("10-25 02:31:07"), None),
)


@dataclass(frozen=True)
class Down:
    """A time in which no service ran. `fired`: when the slots in it were handled."""

    since: datetime
    until: datetime

    @property
    def fired(self) -> datetime:
        return self.until + timedelta(seconds=1)

    def has(self, slot: datetime) -> bool:
        """Whether a slot was handled only after it."""
        return self.since < slot <= self.fired


DOWNS = (
    Down(at("10-17 22:14:09"), at("10-17 22:31:40")),
    Down(at("10-25 02:10:20"), at("10-25 02:31:04")),
)
