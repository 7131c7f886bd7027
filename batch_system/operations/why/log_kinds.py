"""The kinds of lines that one log has and another lacks. A kind is a line without the numbers, ids
and instants in it. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from batch_system.batch.execution.fingerprint import without_changing
from batch_system.batch.ledger.run_logs import OWN_LOGGER, LogLine
from batch_system.operations.why.results import NewLine

FROM_EACH_END = 500
"""So many lines are read from the beginning and from the end of a log."""
MOST_SHOWN = 12
LONGEST = 500
"""The first line of a message is compared and shown up to this many characters."""
_SEVERITY = {"debug": 0, "info": 1, "warning": 2, "error": 3, "exception": 3, "critical": 4}


def new_lines(good: Sequence[LogLine], bad: Sequence[LogLine]) -> tuple[list[NewLine], int]:
    """The first line of each kind that only `bad` has, and how many kinds these are. Call it in a
    thread: it reads a thousand lines of each log.

    At most MOST_SHOWN lines: the severest ones, in the order of the log. Lines of the service
    itself are left out.
    """
    known = {_kind(line) for line in good}
    first: dict[tuple[str, str], LogLine] = {}
    times: Counter[tuple[str, str]] = Counter()
    for line in bad:
        kind = _kind(line)
        if line.logger == OWN_LOGGER or kind in known:
            continue
        first.setdefault(kind, line)
        times[kind] += 1
    # sorted() keeps the order of equal ones.
    severest = sorted(first, key=lambda kind: -_SEVERITY.get(kind[0], 1))[:MOST_SHOWN]
    shown = set(severest)
    lines = [
        NewLine(at=line.at, level=line.level, text=_text(line), times=times[kind])
        for kind, line in first.items()
        if kind in shown
    ]
    return lines, len(first)


def _kind(line: LogLine) -> tuple[str, str]:
    return line.level, without_changing(_text(line))


def _text(line: LogLine) -> str:
    return line.text.split("\n", 1)[0][:LONGEST]
