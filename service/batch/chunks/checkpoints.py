"""The rows of batch_checkpoints: how far each loop of a run has come, beside the authors' data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import BigInteger, TextClause, bindparam, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from service import clock
from service.batch.context import fencing
from service.batch.context.current_run import CurrentRun, state_of
from service.database.companions import checkpoints
from service.errors import ChunkError


@dataclass(frozen=True)
class LoopPosition:
    """Where a loop stands after its last commit. `cursor`: JSON, None at the beginning. `count`: items done."""

    cursor: Any = None
    count: int = 0
    chunks: int = 0
    is_finished: bool = False


class Overtaken(ChunkError):
    """A commit of this loop whose reply was lost went through after all."""


def _upsert(rows: str) -> TextClause:
    """Of two commits about one place only the first goes through: the number of chunks is compared, and swapped.

    It rises with each of them. `count` does not: a page may be empty.
    """
    return text(
        f"INSERT INTO batch_checkpoints (run, name, fence, cursor, count, finished, at) VALUES {rows} "
        "ON CONFLICT (run, name) DO UPDATE SET fence = excluded.fence, cursor = excluded.cursor, "
        "count = excluded.count, finished = excluded.finished, at = excluded.at "
        "WHERE CASE WHEN batch_checkpoints.name = '' THEN batch_checkpoints.fence <= excluded.fence "
        "ELSE CAST(batch_checkpoints.cursor ->> 'chunks' AS BIGINT) = :before END"
    ).bindparams(
        bindparam("run", type_=checkpoints.c.run.type),
        bindparam("name", type_=checkpoints.c.name.type),
        bindparam("fence", type_=BigInteger()),
        bindparam("cursor", type_=checkpoints.c.cursor.type),
        bindparam("count", type_=BigInteger()),
        bindparam("before", type_=BigInteger()),
        bindparam("finished", type_=checkpoints.c.finished.type),
        bindparam("at", type_=checkpoints.c.at.type),
    )


PLACE_ROW = "(:run, :name, :fence, :cursor, :count, :finished, :at)"
PLACE = _upsert(PLACE_ROW)
PLACE_AND_FENCE = _upsert(f"(:run, '', :fence, NULL, NULL, false, :at), {PLACE_ROW}")
"""One statement for both: each costs a round trip in each chunk."""


async def read(connection: AsyncConnection, run: CurrentRun, name: str) -> LoopPosition:
    """As it is committed; the beginning where there is no row."""
    columns = (checkpoints.c.cursor, checkpoints.c["count"], checkpoints.c.finished)
    query = select(*columns).where(checkpoints.c.run == run.id, checkpoints.c.name == name)
    row = (await connection.execute(query)).first()
    if row is None:
        return LoopPosition()
    cursor, count, is_finished = row
    return LoopPosition(cursor["after"], count, cursor["chunks"], is_finished)


async def write(db: AsyncSession, run: CurrentRun, name: str, before: LoopPosition, after: LoopPosition) -> None:
    """In the session's transaction, as the last before its commit: the place, and the fence where the run has one.

    Raises Overtaken when the loop does not stand at `before` any more, and LeaseLost.
    """
    values = {
        "name": name,
        "cursor": {"after": after.cursor, "chunks": after.chunks},
        "count": after.count,
        "finished": after.is_finished,
        "before": before.chunks,
    }
    if not await db.run_sync(_write, run, values):
        raise Overtaken(f"{run.task}: chunk {after.chunks} of {name!r} has been committed already, and is not again")


def _write(session: Session, run: CurrentRun, values: dict[str, Any]) -> bool:
    session.flush()
    connection = session.connection()
    state = state_of(run)
    if state.is_fenced:
        return fencing.check_with(connection, state, PLACE_AND_FENCE, values)
    values = {"run": run.id, "fence": state.fence, "at": clock.now(), **values}
    return connection.execute(PLACE, values).rowcount == 1
