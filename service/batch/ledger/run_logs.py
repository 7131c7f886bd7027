"""Run logs in the ledger: blocks of lines, each a compressed JSON array."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger.tables import log

BLOCK_BYTES = 256_000
"""Lines go into a block until they are so many bytes: whoever reads a log has some blocks in memory at a time."""

MOST_UNPACKED = 32_000_000
"""Bytes of a block as JSON. Earlier versions may have written larger ones, which are not read."""


@dataclass(frozen=True)
class LogLine:
    at: str
    level: str
    logger: str
    text: str

    @property
    def size(self) -> int:
        """About how many bytes it takes, in memory or in the ledger."""
        return 200 + sys.getsizeof(self.text)


@dataclass(frozen=True)
class Block:
    """Some lines of one run, counted from `first_line` (0) within what was written under this fence."""

    run: str
    fence: int
    attempt: int
    first_line: int
    lines: Sequence[LogLine]

    @property
    def size(self) -> int:
        """About how many bytes it takes while it waits."""
        return sum(line.size for line in self.lines)


@dataclass(frozen=True)
class Packed:
    """A block as it is stored. Some of them fit into memory where their lines would not."""

    run: str
    fence: int
    attempt: int
    first_line: int
    lines: int
    block: bytes

    def unpacked(self) -> Block:
        return Block(self.run, self.fence, self.attempt, self.first_line, list(unpack(self.block)))


def split(lines: Sequence[LogLine]) -> Iterator[list[LogLine]]:
    """The lines of one block after the other."""
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
    """The rows for these blocks. Compresses, so call it in a thread."""
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
    if not packed:
        return
    listed, values = ", ".join(c.name for c in log.c), ", ".join(f":{c.name}" for c in log.c)
    # A block may be there already: the reply to its COMMIT was lost.
    statement = text(f"INSERT INTO batch_log ({listed}) VALUES ({values}) ON CONFLICT DO NOTHING")
    await connection.execute(statement.bindparams(*(bindparam(c.name, type_=c.type) for c in log.c)), packed)


async def read(connection: AsyncConnection, run: str) -> list[LogLine]:
    """All lines of a run, oldest first."""
    statement = select(log.c.block).where(log.c.run == run).order_by(log.c.fence, log.c.first_line)
    return [line for block in (await connection.execute(statement)).scalars() for line in unpack(block)]


async def fences(connection: AsyncConnection, run: str) -> list[int]:
    """The fences under which this run has logged, oldest first."""
    statement = select(log.c.fence).where(log.c.run == run).distinct().order_by(log.c.fence)
    return list((await connection.execute(statement)).scalars())


async def page(connection: AsyncConnection, run: str, fence: int, first_line: int, limit: int) -> list[Packed]:
    """The next blocks that were written under this fence, from line `first_line` on; at most `limit`."""
    statement = (
        select(log.c.attempt, log.c.first_line, log.c.lines, log.c.block)
        .where(log.c.run == run, log.c.fence == fence, log.c.first_line >= first_line)
        .order_by(log.c.first_line)
        .limit(limit)
    )
    return [Packed(run, fence, *row) for row in await connection.execute(statement)]


async def tail(connection: AsyncConnection, run: str, count: int) -> list[LogLine]:
    """The last `count` lines of a run, oldest first."""
    newest = select(log.c.block).where(log.c.run == run).order_by(log.c.fence.desc(), log.c.first_line.desc())
    lines: list[LogLine] = []
    number = 0
    while len(lines) < count:
        block = (await connection.execute(newest.offset(number).limit(1))).scalar()
        if block is None:
            break
        lines = [*unpack(block), *lines]
        number += 1
    return lines[-count:]


def unpack(block: bytes) -> Iterator[LogLine]:
    decompressor = zlib.decompressobj()
    encoded = decompressor.decompress(block, MOST_UNPACKED)
    if not decompressor.eof:
        at = encoded[3:].partition(b'"')[0].decode(errors="replace")
        text = f"some lines can't be shown: their block is incomplete, or has more than {MOST_UNPACKED:,} bytes"
        yield LogLine(at, "warning", "service.batch", text)
        return
    for fields in json.loads(encoded):
        yield LogLine(*fields)
