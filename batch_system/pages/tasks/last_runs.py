"""The last runs of a task, with the slots between them that did not run. Equal neighbours are one
line, as in the list of runs. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from statistics import median

from batch_system.batch.ledger.states import ACTIVE, RunState
from batch_system.operations.tasks.history import LastRun
from batch_system.pages.runs.run_lines import LEAST, LEAST_FAILED

MOST_LINES = 12


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
        least = LEAST_FAILED if its[0].state == RunState.FAILED else LEAST
        if its[0].run is not None and its[0].state not in ACTIVE and len(its) >= least:
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
