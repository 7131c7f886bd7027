"""Reads and writes the position of a loop: its row in batch_checkpoints, a table beside the
authors' data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    Integer,
    TextClause,
    func,
    literal_column,
    select,
)
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from batch_system import clock
from batch_system.batch.context import fencing
from batch_system.batch.context.current_run import CurrentRun, state_of
from batch_system.database import sql
from batch_system.database.companions import checkpoints
from batch_system.errors import ChunkError


@dataclass(frozen=True)
class LoopPosition:
    """Where a loop stands after its last commit.

    Attributes:
      cursor: The key, or position, of the last committed item, as JSON; None at the beginning.
      count: The number of items in committed chunks.
      chunks: The number of committed chunks.
      is_finished: Whether the loop came to its end.
    """

    cursor: Any = None
    count: int = 0
    chunks: int = 0
    is_finished: bool = False


@dataclass(frozen=True)
class Committed:
    """How many chunks all loops of a run have committed, and the items in them."""

    chunks: int
    items: int


class Overtaken(ChunkError):
    """The chunk is already committed: an earlier COMMIT succeeded, although its reply was lost."""


def _upsert(rows: str) -> TextClause:
    """Insert these rows, or update existing ones whose number of committed chunks is `:before`.

    That number rises with each commit, so the second of two writers of one position changes no row.
    `count` would not work, because a chunk may be empty. The row without a name is that of the
    fence; it is updated unless its fence is newer.
    """
    return sql.statement(
        "INSERT INTO batch_checkpoints (run, name, fence, cursor, count, finished, at) "
        f"VALUES {rows} "
        "ON CONFLICT (run, name) DO UPDATE SET fence = excluded.fence, cursor = excluded.cursor, "
        "count = excluded.count, finished = excluded.finished, at = excluded.at "
        "WHERE CASE WHEN batch_checkpoints.name = '' THEN batch_checkpoints.fence <= "
        "excluded.fence "
        "ELSE CAST(batch_checkpoints.cursor ->> 'chunks' AS BIGINT) = :before END",
        run=checkpoints.c.run,
        name=checkpoints.c.name,
        fence=BigInteger(),
        cursor=checkpoints.c.cursor,
        count=BigInteger(),
        before=BigInteger(),
        finished=checkpoints.c.finished,
        at=checkpoints.c.at,
    )


ROW = "(:run, :name, :fence, :cursor, :count, :finished, :at)"
UPSERT = _upsert(ROW)
UPSERT_WITH_FENCE = _upsert(f"(:run, '', :fence, NULL, NULL, false, :at), {ROW}")
"""Both rows in one statement, which saves each chunk a round trip."""


async def read(connection: AsyncConnection, run: CurrentRun, name: str) -> LoopPosition:
    """The committed position of a loop; the beginning if it has no row."""
    columns = (checkpoints.c.cursor, checkpoints.c["count"], checkpoints.c.finished)
    query = select(*columns).where(checkpoints.c.run == run.id, checkpoints.c.name == name)
    row = (await connection.execute(query)).first()
    if row is None:
        return LoopPosition()
    cursor, count, is_finished = row
    return LoopPosition(cursor["after"], count, cursor["chunks"], is_finished)


async def committed(connection: AsyncConnection, run: str) -> Committed:
    """What all loops of a run have committed so far."""
    chunks = literal_column("CAST(cursor ->> 'chunks' AS BIGINT)", Integer())
    sums = select(func.sum(chunks), func.sum(checkpoints.c["count"]))
    of_loops = checkpoints.c.name.startswith("chunks:")
    number, items = (await connection.execute(sums.where(checkpoints.c.run == run, of_loops))).one()
    return Committed(int(number or 0), int(items or 0))


async def write(
    db: AsyncSession, run: CurrentRun, name: str, before: LoopPosition, after: LoopPosition
) -> None:
    """Write the position of a loop, and the fence of a fenced run, in the session's transaction
    just before its commit.

    Raises Overtaken if the committed position is no longer `before`, and LeaseLost if another node
    has the run.
    """
    values = {
        "name": name,
        "cursor": {"after": after.cursor, "chunks": after.chunks},
        "count": after.count,
        "finished": after.is_finished,
        "before": before.chunks,
    }
    if not await db.run_sync(_write, run, values):
        raise Overtaken(
            f"{run.task}: chunk {after.chunks} of {name!r} is already committed, so it is not "
            "committed again"
        )


def _write(session: Session, run: CurrentRun, values: dict[str, Any]) -> bool:
    session.flush()
    connection = session.connection()
    state = state_of(run)
    if state.is_fenced:
        return fencing.check_with(connection, state, UPSERT_WITH_FENCE, values)
    values = {"run": run.id, "fence": state.fence, "at": clock.now(), **values}
    return connection.execute(UPSERT, values).rowcount == 1
