"""The last runs of a task, of which equal neighbours are one line. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from statistics import median

from batch_system.operations.tasks.history import LastRun

MOST_LINES = 12
FEWEST, FEWEST_FAILED = 3, 2
"""So many runs in a row are one line."""
FOLDED = ("succeeded", "failed", "skipped", "cancelled")


@dataclass(frozen=True)
class Line:
    """Runs from the slot `first` to `last`. `number`: how many; 1: `run` is the only one, which a
    missed range does not have. `seconds`: their median. `items`: those of all runs together.
    """

    state: str
    first: datetime
    last: datetime
    number: int
    run: str | None
    seconds: float | None
    late: float | None
    reason: str | None
    items: int | None


def lines_of(runs: Sequence[LastRun]) -> list[Line]:
    """The newest lines first. `runs`: the newest first."""
    lines: list[Line] = []
    for _, group in groupby(
        runs, key=lambda each: (each.run is None, each.state, each.fingerprint)
    ):
        its = list(group)
        fewest = FEWEST_FAILED if its[0].state == "failed" else FEWEST
        if its[0].run is not None and its[0].state in FOLDED and len(its) >= fewest:
            lines.append(_line(its))
        else:
            lines += [_line([each]) for each in its]
    return lines[:MOST_LINES]


def _line(its: Sequence[LastRun]) -> Line:
    newest = its[0]
    seconds = [each.seconds for each in its if each.seconds is not None]
    items = [each.items for each in its if each.items is not None]
    return Line(
        state=newest.state,
        first=its[-1].at,
        last=newest.until or newest.at,
        number=len(its) if newest.run is not None else newest.number,
        run=newest.run if len(its) == 1 else None,
        seconds=median(seconds) if seconds else None,
        late=newest.late,
        reason=newest.reason,
        items=sum(items) if items else None,
    )
