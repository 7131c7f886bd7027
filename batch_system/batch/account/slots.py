"""The slots of an interval by the schedules of a task, and what the ledger has for each of them.
Pure: the account and the tally of Night both classify slots here.

A schedule has the slots in (valid_from, valid_until]. A change of schedule first handles the slots
of the old schedule up to and including the instant of the change, so a slot at that very instant
belongs to the old schedule.

Slots are computed without cursors. The cursor of a schedule only separates slots that are not
handled yet from gaps: slots before the cursor that have no row. Slots are computed with this
machine's time zone data; if that has changed since the slots were handled, the account differs from
the ledger.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeVar

from batch_system.batch.cron.cron import Schedule, schedule
from batch_system.batch.firing.misfires import INSTANT
from batch_system.batch.ledger.states import RunState
from batch_system.errors import InvalidSchedule


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


def kind_of(
    slot: datetime, state: str | None, is_missed: bool, handled: datetime, late: datetime
) -> Kind:
    """What a slot is. `state`: of its run; None: it has none. `is_missed`: whether a missed range
    contains it.

    Slots after `handled` are not handled yet, and those of them that were due before `late` are
    late.
    """
    if state is not None:
        return Kind.SKIPPED if state == RunState.SKIPPED else Kind.RUN
    if is_missed:
        return Kind.MISSED
    if slot <= handled:
        return Kind.GAP
    return Kind.LATE if slot < late else Kind.DUE


@dataclass(frozen=True)
class Span:
    """The part (after, until] of an interval in which a schedule was valid.

    Attributes:
        schedule: None if it can't be read; `error` says why.
        handled: Slots after it are not fired yet. Spans that differ only in it have the same slots,
            and are equal.
    """

    schedule: Schedule | None
    after: datetime
    until: datetime
    handled: datetime = field(compare=False)
    error: str = field(default="", compare=False)

    @classmethod
    def of(cls, row: Any, since: datetime, until: datetime) -> Span:
        """From a row of a schedule with `accounted_from` of its task: earlier slots are left out.
        The interval includes both ends.
        """
        begin = max(since, row.accounted_from or since)
        is_open = row.valid_until is None
        after = max(row.valid_from, begin - INSTANT)
        end = until if is_open else min(row.valid_until, until)
        handled = max(row.fired_until, row.valid_from) if is_open else until
        try:
            return cls(schedule(row.cron, row.timezone), after, end, handled)
        except InvalidSchedule as error:  # another version of the service has written it
            return cls(None, after, end, handled, error.message)

    def overlaps(self, first: datetime, last: datetime) -> bool:
        """Whether it shares an instant with the time from `first` to `last`."""
        return self.after < last and first <= self.until


def slots_of(spans: Sequence[Span], after: datetime, until: datetime) -> Iterator[datetime]:
    """The slots of all spans in (after, until], each once: schedules overlap if a machine's clock
    was set back.
    """
    slots = [
        span.schedule.between(max(span.after, after), min(span.until, until))
        for span in spans
        if span.schedule is not None and span.after < until and span.until > after
    ]
    previous = None
    for slot in slots[0] if len(slots) == 1 else heapq.merge(*slots):
        if slot != previous:
            yield slot
        previous = slot


class _Range(Protocol):
    """A missed range; both slots belong to it."""

    @property
    def first(self) -> datetime: ...

    @property
    def last(self) -> datetime: ...


R = TypeVar("R", bound=_Range)


class Ranges(Generic[R]):
    """The missed ranges of a task, in the order of their first slots."""

    def __init__(self, ranges: Iterable[R]) -> None:
        self._later = deque(ranges)
        self._current: list[R] = []

    def at(self, slot: datetime) -> list[R]:
        """The ranges that contain this slot. Call it for the slots in their order."""
        while self._later and self._later[0].first <= slot:
            self._current.append(self._later.popleft())
        if self._current:
            self._current = [each for each in self._current if each.last >= slot]
        return self._current
