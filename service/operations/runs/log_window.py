"""The end of a run's log, or the lines up to one of them, with the numbers that the lines have in
the whole log.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import and_, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger.run_logs import Packed
from service.batch.ledger.tables import log
from service.concurrency.offload import offload
from service.errors import UnknownRun
from service.operations.asking.context import Context
from service.operations.asking.results import Result
from service.operations.people.redacting import refuse_hidden_log
from service.operations.runs import run_log
from service.operations.runs.read import run_of
from service.operations.runs.results import NumberedLine
from service.operations.runs.run_log import MOST_BLOCKS

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


class _Fence(NamedTuple):
    """The lines under a fence: how many there are before them, and how many there are."""

    fence: int
    before: int
    lines: int


class _Wanted(NamedTuple):
    level: int
    needle: str | None


async def window(
    context: Context, given: str, to: int | None, limit: int, level: str, contains: str | None
) -> LogWindow:
    """At most `limit` lines of the log of a run, up to line number `to`; None: the last lines.

    `level`, `text`: as for `log_page`. Raises UnknownRun.
    """
    run = await run_of(context, given)
    await refuse_hidden_log(context, run)
    wanted = _Wanted(logging.getLevelNamesMapping()[level], contains.lower() if contains else None)
    async with context.databases.reading() as connection:
        if connection is None:
            raise UnknownRun(f"the run {run} was deleted meanwhile")
        fences = await _fences(connection, run)
        total = sum(each.lines for each in fences)
        end = total if to is None else max(0, min(to, total))
        found: list[tuple[int, NumberedLine]] = []
        looked, at = 0, end
        while at and looked < MOST_BLOCKS and len(found) < limit:
            blocks = await _before(connection, run, *_place(fences, at))
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
    fences: list[_Fence] = []
    if page.lines:
        async with context.databases.reading() as connection:
            fences = (
                await _fences(connection, await run_of(context, given))
                if connection is not None
                else []
            )
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


async def _fences(connection: AsyncConnection, run: str) -> list[_Fence]:
    number = func.max(log.c.first_line + log.c.lines)
    query = (
        select(log.c.fence, number)
        .where(log.c.run == run)
        .group_by(log.c.fence)
        .order_by(log.c.fence)
    )
    found, before = [], 0
    for fence, lines in await connection.execute(query):
        found.append(_Fence(fence, before, lines))
        before += lines
    return found


def _place(fences: Sequence[_Fence], number: int) -> tuple[int, int]:
    """The fence of the line with this number, and how many lines of the fence there are up to
    it.
    """
    for each in fences:
        if number <= each.before + each.lines:
            return each.fence, number - each.before
    return (fences[-1].fence, fences[-1].lines) if fences else (0, 0)


async def _before(connection: AsyncConnection, run: str, fence: int, line: int) -> list[Packed]:
    """The blocks with lines before this one, the newest first; at most PAGE."""
    is_before = or_(log.c.fence < fence, and_(log.c.fence == fence, log.c.first_line < line))
    columns = (log.c.fence, log.c.attempt, log.c.first_line, log.c.lines, log.c.block)
    query = select(*columns).where(log.c.run == run, log.c.fence <= fence, is_before)
    rows = await connection.execute(
        query.order_by(log.c.fence.desc(), log.c.first_line.desc()).limit(PAGE)
    )
    return [Packed(run, *row) for row in rows]


def _matching(
    blocks: Sequence[Packed], fences: Sequence[_Fence], end: int, wanted: _Wanted, most: int
) -> tuple[list[tuple[int, NumberedLine]], int]:
    """The lines that are wanted, the newest first, and up to which number lines were not looked
    at.
    """
    before = {each.fence: each.before for each in fences}
    levels = logging.getLevelNamesMapping()
    found: list[tuple[int, NumberedLine]] = []
    for packed in blocks:
        lines = list(enumerate(packed.unpacked().lines, start=packed.first_line))
        for number, line in reversed(lines):
            overall = before.get(packed.fence, 0) + number + 1
            if overall > end:
                continue
            if len(found) == most:
                return found, overall
            is_loud = levels.get(line.level.upper(), 0) >= wanted.level
            if is_loud and (wanted.needle is None or wanted.needle in line.text.lower()):
                found.append(
                    (overall, NumberedLine.of(vars(line), attempt=packed.attempt, number=number))
                )
        end = min(end, before.get(packed.fence, 0) + packed.first_line)
    return found, end
