"""The answer to "why?" as lines of text: for a terminal, a ticket or a chat. Instants are in UTC.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterator

from batch_system.escaping import line
from batch_system.operations.why.results import Comparison, RunDifference, Why
from batch_system.words import kept_back_in_words

_WORDS = {
    "version": "version",
    "file": "content of the task's file",
    "policy": "policy",
    "setting": "setting",
    "parameter": "parameter",
    "schedule": "schedule",
    "clock": "clock of",
    "node": "host",
    "duration": "duration",
    "log": "log",
}


def lines_of(why: Why) -> Iterator[str]:
    """The lines, without their line feeds. Control characters are escaped."""
    yield line(why.verdict)
    if why.error is not None:
        yield f"  {line(why.error)}"
    for reason in why.reasons:
        yield f"  {line(reason.text)}"
    if why.comparison is not None:
        yield from _comparison(why.comparison)
    if why.mended is not None and why.mended.differences:
        yield "  the run that made the last one good differs from it:"
        for each in why.mended.differences:
            yield f"    {line(difference_in_words(each, is_mended=True))}"
    if why.keeps_back:
        yield f"  it keeps back {line(kept_back_in_words(why.keeps_back))}"
    if why.next:
        yield f"next: {' · '.join(line(command) for command in why.next)}"


def _comparison(compared: Comparison) -> Iterator[str]:
    if not compared.differences:
        same = ", ".join(compared.same)
        yield f"  nothing that is recorded differs from the last good run: {same} are the same"
    else:
        yield "  differs from the last good run:"
        for each in compared.differences:
            yield f"    {line(difference_in_words(each))}"
    for new in compared.new_lines:
        times = f" ({new.times:,} times)" if new.times > 1 else ""
        yield f"  new in the log: [{line(new.level)}] {line(new.text)}{times}"
    if (more := compared.new_kinds - len(compared.new_lines)) > 0:
        yield f"  new in the log: {more:,} more kinds of lines"


def difference_in_words(difference: RunDifference, is_mended: bool = False) -> str:
    """Such as `setting GIRO_URL: https://giro/v1 -> https://giro/v2`, from the good run to the bad
    one; `is_mended`: from the bad one to the good one.
    """
    name = f" {difference.name}" if difference.name is not None else ""
    old, new = (
        value if value is not None else "none" for value in (difference.good, difference.bad)
    )
    if is_mended:
        old, new = new, old
    return f"{_WORDS[difference.part]}{name}: {old} -> {new}"
