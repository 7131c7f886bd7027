"""The rows of batch_checkpoints: how far each loop of a run has come, beside the authors' data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import BigInteger, bindparam, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from service import clock
from service.batch.context import CurrentRun
from service.batch.tables import checkpoints
from service.database.engine import Database
from service.errors import ChunkError


@dataclass(frozen=True)
class Place:
    """Where a loop stands after its last commit. `cursor`: JSON, None at the beginning."""

    cursor: Any = None
    count: int = 0
    chunks: int = 0
    is_finished: bool = False


class Overtaken(ChunkError):
    """A commit of this loop whose reply was lost went through after all."""


# Of two commits about one place only the first goes through: `count` and `chunks` are compared, and swapped.
WRITE = text(
    "INSERT INTO batch_checkpoints (run, name, fence, cursor, count, finished, at) "
    "VALUES (:run, :name, :fence, :cursor, :count, :finished, :at) "
    "ON CONFLICT (run, name) DO UPDATE SET fence = excluded.fence, cursor = excluded.cursor, "
    "count = excluded.count, finished = excluded.finished, at = excluded.at "
    "WHERE batch_checkpoints.count = :before RETURNING count"
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


async def read(database: Database, run: CurrentRun, name: str) -> Place:
    """As it is committed; the beginning where there is no row."""
    columns = (checkpoints.c.cursor, checkpoints.c["count"], checkpoints.c.finished)
    query = select(*columns).where(checkpoints.c.run == run.id, checkpoints.c.name == name)
    async with database.reader.connect() as connection:
        row = (await connection.execute(query)).first()
    if row is None:
        return Place()
    cursor, count, is_finished = row
    return Place(cursor["after"], count, cursor["chunks"], is_finished)


async def write(db: AsyncSession, run: CurrentRun, name: str, before: Place, after: Place) -> None:
    """In the session's transaction. Raises Overtaken when the loop does not stand at `before` any more."""
    values = {
        "run": run.id,
        "name": name,
        "fence": run.fence,
        "cursor": {"after": after.cursor, "chunks": after.chunks},
        "count": after.count,
        "finished": after.is_finished,
        "before": before.count,
        "at": clock.now(),
    }
    if (await db.execute(WRITE, values)).first() is None:
        raise Overtaken(f"{run.task}: chunk {after.chunks} of {name!r} has been committed already, and is not again")
