"""The lines of the list of runs: what goes on comes first, then the newest, with a heading for each
day and for each time in which no service ran. Equal runs of a task are one line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from statistics import median
from typing import Any

from batch_system.batch.ledger.states import ACTIVE, RunState
from batch_system.escaping import brief, to_json
from batch_system.operations.asking.results import RunShort, RunSummary
from batch_system.operations.incidents.results import Incident
from batch_system.operations.runs.blocking import blocker_in_words
from batch_system.operations.runs.remarks import Remark
from batch_system.pages.frame import formatting
from batch_system.pages.frame.viewer import Viewer
from batch_system.words import short

LEAST, LEAST_FAILED = 3, 2
"""So many equal runs are one line."""


@dataclass(frozen=True)
class Line:
    """A run, or equal runs of a task with their newest one. `seconds`: how long it took, or the
    median of all. `first`: the earliest of the runs.
    """

    run: RunSummary
    runs: tuple[RunSummary, ...]
    seconds: float | None

    @property
    def number(self) -> int:
        return len(self.runs)

    @property
    def first(self) -> RunSummary:
        return self.runs[-1]

    @property
    def ids(self) -> str:
        """The ids of all its runs, as a checkbox sends them."""
        return ",".join(run.id for run in self.runs)

    @property
    def items(self) -> str:
        """How many items were processed, such as "12,004 items", "5,236 of 31,000 items" or, of
        several runs, "9,218 items together"; empty if none were counted.
        """
        count, total = self.run.count, self.run.total
        if self.number > 1:
            together = sum(run.count or 0 for run in self.runs)
            return f"{formatting.counted(together, 'item')} together" if together else ""
        if total and total != count:
            return f"{formatting.number(count or 0)} of {formatting.counted(total, 'item')}"
        return formatting.counted(count, "item") if count else ""


@dataclass(frozen=True)
class Part:
    """Lines under a heading. `link`: to the incident, for a time in which no service ran."""

    heading: str
    lines: list[Line]
    link: str = ""


def lines_of(
    runs: Sequence[RunSummary], now: datetime, is_folded: bool, unfolded: str | None
) -> list[Line]:
    """The lines of these runs, the newest first. `unfolded`: the newest run of a line that is not
    folded.
    """
    lines: list[Line] = []
    place: dict[str, int] = {}
    for run in runs:
        line = Line(run, (run,), seconds_of(run, now))
        at = place.get(run.task)
        if at is not None and is_folded and _are_equal(lines[at].run, run):
            lines[at] = replace(lines[at], runs=(*lines[at].runs, run))
        else:
            place[run.task] = len(lines)
            lines.append(line)
    return sorted(
        (out for line in lines for out in _settled(line, now, unfolded)),
        key=lambda line: (line.run.created_at, line.run.id),
        reverse=True,
    )


def _are_equal(one: RunSummary, other: RunSummary) -> bool:
    return (
        one.state == other.state
        and one.state not in ACTIVE
        and one.fingerprint == other.fingerprint
    )


def _settled(line: Line, now: datetime, unfolded: str | None) -> Iterator[Line]:
    """The line, or a line for each of its runs if they are too few to be folded."""
    least = LEAST_FAILED if line.run.state == RunState.FAILED else LEAST
    if line.number >= least and line.run.id != unfolded:
        taken = [seconds for run in line.runs if (seconds := seconds_of(run, now)) is not None]
        yield replace(line, seconds=median(taken) if taken else None)
    else:
        for run in line.runs:
            yield Line(run, (run,), seconds_of(run, now))


def seconds_of(run: RunShort[Any], now: datetime) -> float | None:
    """How long the last attempt took, or has taken up to now."""
    if run.began_at is None:
        return None
    return ((run.finished_at or now) - run.began_at).total_seconds()


def remark_in_words(remark: Remark) -> str:
    """What holds the run; else who asked for it and why, and what it has returned. Empty if there
    is nothing to say.
    """
    if (blocker := remark.blocker) is not None:
        if blocker.kind == "run" and blocker.run is not None:
            return f"waits for run {short(blocker.run)} of the same task"
        words = blocker_in_words(blocker)
        return f"waits {words}" if words.startswith("for ") else words
    result = _result_in_brief(remark.result) if remark.result is not None else ""
    if remark.note:
        return " · ".join(filter(None, (f"{remark.by}: “{brief(remark.note)}”", result)))
    return result or (f"by {remark.by}" if remark.by else "")


def _result_in_brief(result: Any) -> str:
    """A result on one line: an object as its fields, such as "rows: 4,118, skipped: 3"."""
    if isinstance(result, dict) and result:
        return ", ".join(f"{name}: {_value_in_brief(value)}" for name, value in result.items())
    return _value_in_brief(result)


def _value_in_brief(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return to_json(value)


def parts_of(
    going_on: Sequence[Line], lines: Sequence[Line], outages: Sequence[Incident], viewer: Viewer
) -> list[Part]:
    """The lines under their headings. Outages before the last line are left out."""
    parts = [Part(f"Still going on · {len(going_on)}", [*going_on])] if going_on else []
    oldest = lines[-1].run.created_at if lines else viewer.now
    shown = [each for each in outages if each.last_at >= oldest]
    placed: list[tuple[datetime, Line | Incident]] = [
        *((line.run.created_at, line) for line in lines),
        *((outage.last_at, outage) for outage in shown),
    ]
    last_day = None
    for at, each in sorted(placed, key=lambda pair: pair[0], reverse=True):
        if (day := formatting.day(at, viewer.zone, viewer.now)) != last_day:
            parts.append(Part(day, []))
            last_day = day
        if isinstance(each, Line):
            parts[-1].lines.append(each)
        else:
            parts.append(Part(_outage(each, viewer), [], f"/incidents/{each.id}"))
    return [part for part in parts if part.lines or part.link]


def _outage(incident: Incident, viewer: Viewer) -> str:
    begin = datetime.fromisoformat(incident.subject or incident.last_at.isoformat())
    clock = formatting.clock
    return f"{clock(begin, viewer.zone)} – {clock(incident.last_at, viewer.zone)} · no service ran"
