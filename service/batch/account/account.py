"""What an account says of one task: how many slots were what, and what is to be told of. Pure; see accounting.py."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What is there for a slot; `late` is due although a running service has the task.

    The last three are no slots: a scheduled run that no schedule asks for, a missed range whose count is not that of
    the slots in it, and a time in which the schedule can't be read.
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
TOLD = (Kind.DUE, Kind.LATE, Kind.GAP, Kind.SURPLUS, Kind.RANGE, Kind.UNREADABLE)
WRONG = (Kind.LATE, Kind.GAP, Kind.RANGE, Kind.UNREADABLE)


class Entry(NamedTuple):
    """One slot: `run` is the id of its run with the `state`, `reason` that of a skip or of a missed range."""

    task: str
    slot: datetime
    kind: Kind
    run: str | None = None
    state: str | None = None
    reason: str | None = None


@dataclass
class Finding:
    """`count` entries in a row, from `first` to `last`, that are of one kind in TOLD."""

    kind: Kind
    first: datetime
    last: datetime
    count: int
    text: str = ""


@dataclass
class Account:
    """What became of the slots of one task, `since` and `until` included. `since` may be later than was asked for."""

    task: str
    since: datetime
    until: datetime
    counts: Counter[Kind] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    _last: Kind | None = None

    @property
    def slots(self) -> int:
        return sum(self.counts[kind] for kind in SLOTS)

    @property
    def is_complete(self) -> bool:
        return not any(self.counts[kind] for kind in WRONG)

    def add(self, entry: Entry) -> None:
        if entry.kind in TOLD:
            if entry.kind == self._last:
                self.findings[-1].last = entry.slot
                self.findings[-1].count += 1
            else:
                self.findings.append(Finding(entry.kind, entry.slot, entry.slot, 1))
        self._last = entry.kind
        self.counts[entry.kind] += 1

    def tell(self, finding: Finding) -> None:
        self.counts[finding.kind] += 1
        self.findings.append(finding)
        self._last = None


class Range(NamedTuple):
    """A missed range as it stands in the ledger."""

    id: str
    first: datetime
    last: datetime
    number: int
    reason: str


@dataclass
class _Counted:
    range: Range
    seen: int = 0


class Ranges:
    """The missed ranges of a task, ordered by `first`, beside its slots, which are asked for in order."""

    def __init__(self, ranges: list[Range]) -> None:
        self._counted = [_Counted(found) for found in ranges]
        self._to_come = deque(self._counted)
        self._here: list[_Counted] = []

    def holding(self, slot: datetime) -> Range | None:
        """The range that has this slot. Every slot has to be asked for, so that it is counted."""
        while self._to_come and self._to_come[0].range.first <= slot:
            self._here.append(self._to_come.popleft())
        if not self._here:
            return None
        self._here = [counted for counted in self._here if counted.range.last >= slot]
        for counted in self._here:
            counted.seen += 1
        return self._here[0].range if self._here else None

    def wrong(self) -> Iterator[Finding]:
        """After the last slot: those that have another count than there were slots in them."""
        for found, seen in ((counted.range, counted.seen) for counted in self._counted):
            if found.number != seen:
                told = f"missed range {found.id} says {found.number} slots, the schedules have {seen} there"
                yield Finding(Kind.RANGE, found.first, found.last, 1, told)
