"""The account of one task: the number of its slots of each kind, and findings. Pure; accounting.py
makes it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What the ledger has for a slot. `late` means that a running service has the task but has not
    handled the slot.

    The last three kinds are not slots: `surplus` is a scheduled run whose slot no schedule has,
    `range` is a missed range with another count than the slots in it, and `unreadable` is a period
    whose schedule can't be read.
    """

    RUN = "run"
    SKIPPED = "skipped"
    MISSED = "missed"
    DUE = "due"
    LATE = "late"
    GAP = "gap"
    SURPLUS = "surplus"
    RANGE = "range"
    UNREADABLE = "unreadable"


SLOTS = (Kind.RUN, Kind.SKIPPED, Kind.MISSED, Kind.DUE, Kind.LATE, Kind.GAP)
REPORTED = (Kind.DUE, Kind.LATE, Kind.GAP, Kind.SURPLUS, Kind.RANGE, Kind.UNREADABLE)
INCOMPLETE = (Kind.LATE, Kind.GAP, Kind.RANGE, Kind.UNREADABLE)


class AccountedSlot(NamedTuple):
    """What became of one slot (aware, UTC), or a surplus run.

    `run`: the id of its run. `state`: the state of that run. `reason`: the reason of a skip or of a
    missed range.
    """

    task: str
    slot: datetime
    kind: Kind
    run: str | None = None
    state: str | None = None
    reason: str | None = None


@dataclass
class AccountFinding:
    """`count` consecutive slots from `first` to `last` (both included; aware, UTC), all of one kind
    in REPORTED.
    """

    kind: Kind
    first: datetime
    last: datetime
    count: int
    text: str = ""


@dataclass
class Account:
    """What became of the slots of one task from `since` to `until`, both included; aware, UTC.

    `since` is later than the caller's if the runs before it were pruned.
    """

    task: str
    since: datetime
    until: datetime
    counts: Counter[Kind] = field(default_factory=Counter)
    findings: list[AccountFinding] = field(default_factory=list)
    _last: Kind | None = None

    @property
    def slots(self) -> int:
        """The number of slots, of all kinds."""
        return sum(self.counts[kind] for kind in SLOTS)

    @property
    def is_complete(self) -> bool:
        """True if every slot is a run, a skip, missed, or due for less than a minute."""
        return not any(self.counts[kind] for kind in INCOMPLETE)

    def add(self, slot: AccountedSlot) -> None:
        """Count one slot. Slots are added in order, so that consecutive ones of a kind form one
        finding.
        """
        if slot.kind in REPORTED:
            if slot.kind == self._last:
                self.findings[-1].last = slot.slot
                self.findings[-1].count += 1
            else:
                self.findings.append(AccountFinding(slot.kind, slot.slot, slot.slot, 1))
        self._last = slot.kind
        self.counts[slot.kind] += 1

    def report(self, finding: AccountFinding) -> None:
        """Add a finding that is not about single slots."""
        self.counts[finding.kind] += 1
        self.findings.append(finding)
        self._last = None


class RecordedRange(NamedTuple):
    """A missed range as the ledger has it; `slots` is the recorded number of slots in it."""

    id: str
    first: datetime
    last: datetime
    slots: int
    reason: str


@dataclass
class _CountedRange:
    range: RecordedRange
    seen: int = 0


class RecordedRanges:
    """The missed ranges of a task, ordered by `first`, each with how many slots of its schedules
    lie in it.
    """

    def __init__(self, ranges: list[RecordedRange]) -> None:
        self._counted = [_CountedRange(recorded) for recorded in ranges]
        self._later = deque(self._counted)
        self._current: list[_CountedRange] = []

    def take(self, slot: datetime) -> RecordedRange | None:
        """Count `slot` in the ranges that contain it, and return the first of them. Call it for
        each slot, in order.
        """
        while self._later and self._later[0].range.first <= slot:
            self._current.append(self._later.popleft())
        if not self._current:
            return None
        self._current = [counted for counted in self._current if counted.range.last >= slot]
        for counted in self._current:
            counted.seen += 1
        return self._current[0].range if self._current else None

    def with_wrong_counts(self) -> Iterator[AccountFinding]:
        """A finding for each range whose recorded number of slots is wrong. Call it after the last
        slot.
        """
        for recorded, seen in ((counted.range, counted.seen) for counted in self._counted):
            if recorded.slots != seen:
                text = (
                    f"missed range {recorded.id} counts {recorded.slots} slots, but the schedules "
                    f"have {seen} there"
                )
                yield AccountFinding(Kind.RANGE, recorded.first, recorded.last, 1, text)
