"""Reads the log of a run, block by block, also while the run is active."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator

from service.batch.ledger import run_logs
from service.batch.ledger import runs as run_rows
from service.batch.ledger.run_logs import Block, Packed
from service.batch.ledger.states import FINAL
from service.concurrency.offload import offload
from service.errors import InvalidParameters, UnknownRun
from service.escaping import echoed
from service.operations.asking.context import Context
from service.operations.asking.databases import Databases
from service.operations.asking.results import Line, LogBlock
from service.operations.people.redacting import refuse_hidden_log
from service.operations.runs.read import run_of
from service.operations.runs.results import LOG_CURSOR, POLL_SECONDS, LogPage, NumberedLine

LARGEST, LARGEST_LINE = 2**62, 2**31 - 1
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
    run = await run_of(context, given)
    await refuse_hidden_log(context, run)
    reader = Reader(context.databases, run)
    while True:
        # First: a final state comes with the last lines.
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
        raise UnknownRun(f"the run {run} was deleted meanwhile")
    return row["state"], row["fence"]


async def page(
    context: Context, given: str, after: str | None, limit: int, level: str, contains: str | None
) -> LogPage:
    """A page of the log of a run; see `operations.runs.log_page`."""
    run = await run_of(context, given)
    await refuse_hidden_log(context, run)
    fence, line = parse_place(after) if after is not None else (0, 0)
    least = logging.getLevelNamesMapping()[level]
    lines: list[NumberedLine] = []
    looked = 0
    while looked < MOST_BLOCKS:
        async with context.databases.reading() as connection:
            if connection is None:
                raise UnknownRun(f"the run {run} was deleted meanwhile")
            blocks = await run_logs.following(connection, run, fence, line, PAGE)
        matching, place = await offload(
            _matching, blocks, (fence, line), least, contains, limit - len(lines)
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
        if fence < LARGEST and line < LARGEST_LINE:
            return fence, line
    raise InvalidParameters(
        f"after is {echoed(given)}; allowed: the cursor that a page of this log has given"
    )


def _matching(
    blocks: list[Packed], start: tuple[int, int], least: int, contains: str | None, most: int
) -> tuple[list[NumberedLine], tuple[int, int]]:
    """The lines that are wanted, at most `most`, and the place after the last line that was looked
    at.
    """
    wanted: list[NumberedLine] = []
    place = start
    needle = contains.lower() if contains is not None else None
    levels = logging.getLevelNamesMapping()
    for packed in blocks:
        for number, line in enumerate(packed.unpacked().lines, start=packed.first_line):
            if (packed.fence, number) < place:
                continue
            if len(wanted) == most:
                return wanted, place
            place = packed.fence, number + 1
            if levels.get(line.level.upper(), 0) >= least and (
                needle is None or needle in line.text.lower()
            ):
                wanted.append(NumberedLine.of(vars(line), attempt=packed.attempt, number=number))
    return wanted, place


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
            return await run_logs.fences(connection, self._run) if connection is not None else []

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
