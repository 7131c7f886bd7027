"""Run logs in the ledger: blocks of lines, each a compressed JSON array."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import and_, func, or_, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.tables import log
from batch_system.concurrency.offload import offload
from batch_system.database import sql

BLOCK_BYTES = 256_000
"""A block is full when its lines take this many bytes. A reader of a log has a few blocks in memory
at a time.
"""

MOST_UNPACKED = 32_000_000
"""The size of a block as JSON, in bytes, at most. Larger blocks of earlier versions are not read.
"""

MOST_BLOCKS = 4
"""`ends` reads at most this many blocks from each end."""

AFTER_ALL = 2**62
"""A fence that no run reaches."""
FIRST_FENCE = 1
"""The fence of the first attempt of a run."""


@dataclass(frozen=True)
class LogLine:
    """A line that a run has logged. `at`: the instant in ISO format. `logger`: the name of the
    logger.
    """

    at: str
    level: str
    logger: str
    text: str

    @property
    def size(self) -> int:
        """About how many bytes the line takes in memory and in the ledger."""
        return 200 + sys.getsizeof(self.text)


@dataclass(frozen=True)
class Block:
    """Consecutive lines of one run. `first_line`: the number of the first one among those of this
    fence, from 0.
    """

    run: str
    fence: int
    attempt: int
    first_line: int
    lines: Sequence[LogLine]

    @property
    def size(self) -> int:
        """About how many bytes the block takes in memory."""
        return sum(line.size for line in self.lines)


@dataclass(frozen=True)
class Packed:
    """A block as it is stored, compressed. `lines`: how many lines it has."""

    run: str
    fence: int
    attempt: int
    first_line: int
    lines: int
    block: bytes

    def unpacked(self) -> Block:
        """The block with its lines. It decompresses, so call it in a thread."""
        return Block(self.run, self.fence, self.attempt, self.first_line, unpack(self.block))


class Fence(NamedTuple):
    """The lines under one fence: how many lines the log has before them, and how many lines there
    are.
    """

    fence: int
    before: int
    lines: int


def split(lines: Sequence[LogLine]) -> Iterator[list[LogLine]]:
    """The lines of each block, one block after the other."""
    block: list[LogLine] = []
    size = 0
    for line in lines:
        block.append(line)
        size += line.size
        if size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def pack(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """The rows of these blocks, by column name. It compresses, so call it in a thread."""
    return [
        {
            "run": block.run,
            "fence": block.fence,
            "first_line": block.first_line,
            "lines": len(block.lines),
            "attempt": block.attempt,
            "block": zlib.compress(json.dumps([_fields(line) for line in block.lines]).encode(), 1),
        }
        for block in blocks
    ]


def _fields(line: LogLine) -> tuple[str, str, str, str]:
    return line.at, line.level, line.logger, line.text


async def write(connection: AsyncConnection, packed: list[dict[str, Any]]) -> None:
    """Insert the rows that `pack` has made."""
    if not packed:
        return
    names, values = ", ".join(c.name for c in log.c), ", ".join(f":{c.name}" for c in log.c)
    # The same block may have a row already, if the reply to its COMMIT was lost.
    statement = sql.statement(
        f"INSERT INTO batch_log ({names}) VALUES ({values}) ON CONFLICT DO NOTHING",
        **{column.name: column for column in log.c},
    )
    await connection.execute(statement, packed)


async def fences(connection: AsyncConnection, run: str) -> list[Fence]:
    """The fences under which this run has logged, oldest first."""
    number = func.max(log.c.first_line + log.c.lines)
    query = (
        select(log.c.fence, number)
        .where(log.c.run == run)
        .group_by(log.c.fence)
        .order_by(log.c.fence)
    )
    found, before = [], 0
    for fence, lines in await connection.execute(query):
        found.append(Fence(fence, before, lines))
        before += lines
    return found


async def page(
    connection: AsyncConnection, run: str, fence: int, first_line: int, limit: int
) -> list[Packed]:
    """The blocks of a run under this fence that begin at line `first_line` or later, in order; at
    most `limit`.
    """
    statement = (
        select(log.c.attempt, log.c.first_line, log.c.lines, log.c.block)
        .where(log.c.run == run, log.c.fence == fence, log.c.first_line >= first_line)
        .order_by(log.c.first_line)
        .limit(limit)
    )
    return [Packed(run, fence, *row) for row in await connection.execute(statement)]


async def following(
    connection: AsyncConnection, run: str, fence: int, line: int, limit: int
) -> list[Packed]:
    """The blocks of a run with lines from `line` of this fence on, and those of later fences; at
    most `limit`.
    """
    is_after = or_(
        log.c.fence > fence, and_(log.c.fence == fence, log.c.first_line + log.c.lines > line)
    )
    columns = (log.c.fence, log.c.attempt, log.c.first_line, log.c.lines, log.c.block)
    statement = select(*columns).where(log.c.run == run, log.c.fence >= fence, is_after)
    rows = await connection.execute(statement.order_by(log.c.fence, log.c.first_line).limit(limit))
    return [Packed(run, *row) for row in rows]


async def preceding(
    connection: AsyncConnection, run: str, fence: int, line: int, limit: int
) -> list[Packed]:
    """The blocks of a run with lines before `line` of this fence, and those of earlier fences, the
    newest first; at most `limit`.
    """
    is_before = or_(log.c.fence < fence, and_(log.c.fence == fence, log.c.first_line < line))
    columns = (log.c.fence, log.c.attempt, log.c.first_line, log.c.lines, log.c.block)
    query = select(*columns).where(log.c.run == run, log.c.fence <= fence, is_before)
    newest_first = query.order_by(log.c.fence.desc(), log.c.first_line.desc())
    return [Packed(run, *row) for row in await connection.execute(newest_first.limit(limit))]


async def tail(connection: AsyncConnection, run: str, count: int) -> list[LogLine]:
    """The last `count` lines of a run, oldest first."""
    lines: list[LogLine] = []
    place = AFTER_ALL, 0
    while len(lines) < count and (blocks := await preceding(connection, run, *place, 1)):
        [block] = blocks
        place = block.fence, block.first_line
        lines = [*await offload(unpack, block.block), *lines]
    return lines[-count:]


async def tails(
    connection: AsyncConnection, ids: Collection[str], count: int
) -> dict[str, list[LogLine]]:
    """The same for each of these runs. The last blocks of all logs are read together, and they
    mostly have enough lines.
    """
    if not ids:
        return {}
    kind = connection.dialect.name
    names = ("run", "fence", "attempt", "first_line", "lines", "block")
    columns = [log.c[name] for name in names]
    statement = text(
        f"SELECT {', '.join(f'l.{name}' for name in names)} "
        f"FROM {json_rows.source([log.c.run], kind)} CROSS JOIN batch_log l WHERE l.run = v.run "
        "AND (l.fence, l.first_line) = (SELECT b.fence, b.first_line FROM batch_log b "
        "WHERE b.run = v.run ORDER BY b.fence DESC, b.first_line DESC LIMIT 1)"
    ).columns(*columns)
    values = {"rows": json_rows.encode([{"run": run} for run in ids], kind)}
    packed = [Packed(*row) for row in await connection.execute(statement, values)]
    found = await offload(_last_lines, packed, count)
    for each in packed:
        is_whole = each.fence == FIRST_FENCE and each.first_line == 0
        if not is_whole and each.lines < count:
            found[each.run] = await tail(connection, each.run, count)
    return found


def _last_lines(blocks: Sequence[Packed], count: int) -> dict[str, list[LogLine]]:
    return {each.run: unpack(each.block)[-count:] for each in blocks}


async def ends(
    connection: AsyncConnection, run: str, fences: Sequence[Fence], number: int
) -> list[LogLine]:
    """The first and the last lines of a run under these fences, at most this number of each."""
    if not fences:
        return []
    begin, end = (fences[0].fence, 0), (fences[-1].fence, fences[-1].lines)
    first = await following(connection, run, *begin, MOST_BLOCKS)
    last = await preceding(connection, run, *end, MOST_BLOCKS)
    known = {each.fence for each in fences}
    blocks = {(each.fence, each.first_line): each for each in (*first, *last)}
    lines: list[LogLine] = []
    for place in sorted(place for place in blocks if place[0] in known):
        lines += await offload(unpack, blocks[place].block)
    return lines if len(lines) <= 2 * number else [*lines[:number], *lines[-number:]]


OWN_LOGGER = "batch_system.batch"


def telling_line(lines: Sequence[LogLine]) -> LogLine | None:
    """The last error that the author's code has logged, or else its last line; None if it has
    logged nothing.
    """
    own = [line for line in lines if line.logger != OWN_LOGGER]
    errors = [line for line in own if line.level in ("error", "critical", "exception")]
    return errors[-1] if errors else own[-1] if own else None


def unpack(block: bytes) -> list[LogLine]:
    """The lines of a compressed block. If it can't be read, there is only one line, which says so.

    It decompresses, so call it in a thread.
    """
    decompressor = zlib.decompressobj()
    encoded = decompressor.decompress(block, MOST_UNPACKED)
    if not decompressor.eof:
        at = encoded[3:].partition(b'"')[0].decode(errors="replace")
        text = (
            "some lines can't be shown: their block is incomplete, or has more than "
            f"{MOST_UNPACKED:,} bytes"
        )
        return [LogLine(at, "warning", "batch_system.batch", text)]
    return [LogLine(*fields) for fields in json.loads(encoded)]
