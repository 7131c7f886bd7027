"""The end of a run's log, or the lines up to one of them, with the numbers that the lines have in
the whole log.
"""

from __future__ import annotations

from collections.abc import Sequence

from batch_system.batch.ledger import run_logs
from batch_system.batch.ledger.run_logs import Fence, Packed
from batch_system.concurrency.offload import offload
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import Result
from batch_system.operations.runs import run_log
from batch_system.operations.runs.read import run_of
from batch_system.operations.runs.results import NumberedLine
from batch_system.operations.runs.run_log import MOST_BLOCKS, Wanted, deleted, readable

PAGE = 10


class LogWindow(Result):
    """Lines of a log, the oldest first, each with its number in the whole log, from 1.

    `older`: up to which number there are older lines; None: none. `after`: the cursor of what comes
    after the last line that was looked at. `is_end`: that is the end of the log now. `total`: how
    many lines the log has.
    """

    lines: list[NumberedLine]
    numbers: list[int]
    older: int | None
    after: str
    is_end: bool
    total: int


async def window(
    context: Context, given: str, to: int | None, limit: int, level: str, contains: str | None
) -> LogWindow:
    """At most `limit` lines of the log of a run, up to line number `to`; None: the last lines.

    `level`, `contains`: as for a page of the log. Raises UnknownRun.
    """
    run = await readable(context, given)
    wanted = Wanted.of(level, contains)
    async with context.databases.reading() as connection:
        if connection is None:
            raise deleted(run)
        fences = await run_logs.fences(connection, run)
        total = sum(each.lines for each in fences)
        end = total if to is None else max(0, min(to, total))
        found: list[tuple[int, NumberedLine]] = []
        looked, at = 0, end
        while at and looked < MOST_BLOCKS and len(found) < limit:
            blocks = await run_logs.preceding(connection, run, *_place(fences, at), PAGE)
            if not blocks:
                at = 0
                break
            more, at = await offload(_matching, blocks, fences, at, wanted, limit - len(found))
            found += more
            looked += len(blocks)
    fence, line = _place(fences, end)
    return LogWindow(
        lines=[each for _, each in reversed(found)],
        numbers=[number for number, _ in reversed(found)],
        older=at or None,
        after=f"{fence}.{line}",
        is_end=end == total,
        total=total,
    )


async def following(context: Context, given: str, after: str, limit: int) -> LogWindow:
    """At most `limit` lines of the log of a run after a place, as `log_window` gives them. Raises
    UnknownRun.
    """
    page = await run_log.page(context, given, after, limit, "DEBUG", None)
    fences: list[Fence] = []
    if page.lines:
        async with context.databases.reading() as connection:
            if connection is not None:
                fences = await run_logs.fences(connection, await run_of(context, given))
    fence, line = run_log.parse_place(page.after)
    last = next((each.before for each in fences if each.fence == fence), 0) + line
    return LogWindow(
        lines=page.lines,
        numbers=list(range(last - len(page.lines) + 1, last + 1)),
        older=None,
        after=page.after,
        is_end=page.is_end,
        total=sum(each.lines for each in fences),
    )


def _place(fences: Sequence[Fence], number: int) -> tuple[int, int]:
    """The fence of the line with this number, and how many lines of the fence there are up to
    it.
    """
    for each in fences:
        if number <= each.before + each.lines:
            return each.fence, number - each.before
    return (fences[-1].fence, fences[-1].lines) if fences else (0, 0)


def _matching(
    blocks: Sequence[Packed], fences: Sequence[Fence], end: int, wanted: Wanted, most: int
) -> tuple[list[tuple[int, NumberedLine]], int]:
    """The lines that are wanted, the newest first, and the number up to which lines were not
    read.
    """
    before = {each.fence: each.before for each in fences}
    found: list[tuple[int, NumberedLine]] = []
    for packed in blocks:
        lines = list(enumerate(packed.unpacked().lines, start=packed.first_line))
        for number, line in reversed(lines):
            overall = before.get(packed.fence, 0) + number + 1
            if overall > end:
                continue
            if len(found) == most:
                return found, overall
            if wanted.has(line):
                kept = NumberedLine.of(vars(line), attempt=packed.attempt, number=number)
                found.append((overall, kept))
        end = min(end, before.get(packed.fence, 0) + packed.first_line)
    return found, end
