"""Reads the log of a run: block by block, also while the run is active, or page by page."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

from batch_system.batch.ledger import run_logs
from batch_system.batch.ledger import runs as run_rows
from batch_system.batch.ledger.run_logs import Block, LogLine, Packed
from batch_system.batch.ledger.states import FINAL
from batch_system.concurrency.offload import offload
from batch_system.errors import InvalidParameters, UnknownRun
from batch_system.escaping import echoed
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.databases import Databases
from batch_system.operations.asking.results import Line, LogBlock
from batch_system.operations.people.redacting import refuse_hidden_log
from batch_system.operations.runs.read import run_of
from batch_system.operations.runs.results import LOG_CURSOR, POLL_SECONDS, LogPage, NumberedLine

LEVELS = logging.getLevelNamesMapping()
LARGEST_LINE = 2**31 - 1
MOST_BLOCKS = 60
"""How many blocks are read for a page at most."""
PAGE = 20
LATE_FENCES = 20
"""How many fences before the newest are read again, because a node that lost a run may still write
its last lines.
"""


async def blocks(context: Context, given: str, follow: bool) -> AsyncGenerator[LogBlock | str]:
    """The blocks of a run, oldest first, and at the end its state. With `follow` it ends with the
    run's final state.

    `given`: the id of a run, the beginning of one, or a task, which stands for its newest run. No
    connection is held between blocks. Raises UnknownRun, UnknownTask, Forbidden and DatabaseError.
    """
    run = await readable(context, given)
    reader = Reader(context.databases, run)
    while True:
        # First, because a final state comes with the last lines.
        state, fence = await _state(context.databases, run)
        async for block in reader.new_blocks(fence):
            yield await offload(_log_block, block)
        if not follow or state in FINAL:
            yield state
            return
        await asyncio.sleep(POLL_SECONDS)


def _log_block(packed: Packed) -> LogBlock:
    block: Block = packed.unpacked()
    return LogBlock(
        fence=block.fence,
        attempt=block.attempt,
        lines=[Line.of(vars(line)) for line in block.lines],
    )


async def _state(databases: Databases, run: str) -> tuple[str, int]:
    async with databases.reading() as connection:
        row = await run_rows.get(connection, run) if connection is not None else None
    if row is None:
        raise deleted(run)
    return row["state"], row["fence"]


def deleted(run: str) -> UnknownRun:
    """The error about a run that was there when it was looked up."""
    return UnknownRun(f"the run {run} was deleted meanwhile")


async def readable(context: Context, given: str) -> str:
    """The id of a run whose log the actor may read."""
    run = await run_of(context, given)
    await refuse_hidden_log(context, run)
    return run


@dataclass(frozen=True)
class Wanted:
    """The lines that are wanted: at least of this level, and with this text."""

    level: int
    text: str

    @classmethod
    def of(cls, level: str, contains: str | None) -> Wanted:
        return cls(LEVELS[level], (contains or "").lower())

    def has(self, line: LogLine) -> bool:
        return LEVELS.get(line.level.upper(), 0) >= self.level and self.text in line.text.lower()


async def page(
    context: Context, given: str, after: str | None, limit: int, level: str, contains: str | None
) -> LogPage:
    """At most `limit` lines of the log of a run, the oldest first. `after`: the cursor of the page
    before. Raises UnknownRun.
    """
    run = await readable(context, given)
    fence, line = parse_place(after) if after is not None else (0, 0)
    wanted = Wanted.of(level, contains)
    lines: list[NumberedLine] = []
    looked = 0
    while looked < MOST_BLOCKS:
        async with context.databases.reading() as connection:
            if connection is None:
                raise deleted(run)
            blocks = await run_logs.following(connection, run, fence, line, PAGE)
        matching, place = await offload(
            _matching, blocks, (fence, line), wanted, limit - len(lines)
        )
        lines += matching
        looked += len(blocks)
        fence, line = place
        if len(blocks) < PAGE and len(lines) < limit:
            return LogPage(lines=lines, after=f"{fence}.{line}", is_end=True)
        if len(lines) >= limit:
            break
    return LogPage(lines=lines, after=f"{fence}.{line}", is_end=False)


def parse_place(given: str) -> tuple[int, int]:
    """The fence and the line in a cursor of a log. Raises InvalidParameters."""
    if re.fullmatch(LOG_CURSOR, given):
        fence, line = map(int, given.split("."))
        if fence < run_logs.AFTER_ALL and line < LARGEST_LINE:
            return fence, line
    raise InvalidParameters(
        f"after is {echoed(given)}; allowed: the cursor that a page of this log has given"
    )


def _matching(
    blocks: list[Packed], start: tuple[int, int], wanted: Wanted, most: int
) -> tuple[list[NumberedLine], tuple[int, int]]:
    """The lines that are wanted, at most `most`, and the place after the last line that was
    read.
    """
    found: list[NumberedLine] = []
    place = start
    for packed in blocks:
        for number, line in enumerate(packed.unpacked().lines, start=packed.first_line):
            if (packed.fence, number) < place:
                continue
            if len(found) == most:
                return found, place
            place = packed.fence, number + 1
            if wanted.has(line):
                found.append(NumberedLine.of(vars(line), attempt=packed.attempt, number=number))
    return found, place


class Reader:
    """Reads the new blocks of a run. It keeps its position under each fence, so it returns each
    block once.
    """

    def __init__(self, databases: Databases, run: str) -> None:
        self._databases = databases
        self._run = run
        self._next: dict[int, int] = {}
        self._has_started = False

    async def new_blocks(self, newest: int) -> AsyncIterator[Packed]:
        """The blocks that were written since the last call, as they are stored. `newest`: the run's
        current fence.
        """
        recent = range(max(0, newest - LATE_FENCES), newest + 1)
        fences = list(recent) if self._has_started else await self._fences()
        self._has_started = True
        for fence in fences:
            while page := await self._page(fence):
                for packed in page:
                    yield packed

    async def _fences(self) -> list[int]:
        async with self._databases.reading() as connection:
            if connection is None:
                return []
            return [each.fence for each in await run_logs.fences(connection, self._run)]

    async def _page(self, fence: int) -> list[Packed]:
        begin = self._next.get(fence, 0)
        async with self._databases.reading() as connection:
            page = (
                await run_logs.page(connection, self._run, fence, begin, PAGE)
                if connection is not None
                else []
            )
        if page:
            self._next[fence] = page[-1].first_line + page[-1].lines
        return page
