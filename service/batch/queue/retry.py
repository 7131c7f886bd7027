"""A run that is over goes on, because a person wants it: a new attempt of the same run, in the queue."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import database_time, json_rows, runs, transitions
from service.batch.ledger.states import ACTIVE, Rank
from service.database.companions import checkpoints, quarantine
from service.database.engine import Database
from service.errors import UnknownRun, WrongState


async def retry(connection: AsyncConnection, run_id: str, by: str) -> None:
    """Give a failed, cancelled or skipped run a new attempt, which goes on from its checkpoints.

    Raises UnknownRun, and WrongState that names the state of a run that has succeeded or is not over.
    """
    if not await transitions.reopen(connection, [run_id], Rank.MANUAL, by, await database_time.now_of(connection)):
        raise await _refusal(connection, run_id, "`--again` runs it from the beginning")


async def again(ledger: Database, application: Database, ids: Sequence[str], rank: int, by: str) -> set[str]:
    """Give runs that are over a new attempt from the beginning: what they did is done again. Returns their ids.

    Their checkpoints are cleared in the application's database. Should the process die between the two commits, a run
    stays over, without them.
    """
    async with application.engine.connect() as beside, ledger.engine.begin() as connection:
        # SQLite's write lock, which may have to be waited for, before that of the ledger, which nobody holds for long.
        await beside.execute(text("SELECT 1"))
        now = await database_time.now_of(connection)
        went = await transitions.reopen(connection, ids, rank, by, now, anew=True)
        kind = application.kind
        own = checkpoints.c.run.in_(json_rows.among(checkpoints.c.run, went, kind))
        # The row without a name is the fence of the run: an attempt that was lost must not be able to commit.
        await beside.execute(delete(checkpoints).where(own, checkpoints.c.name != ""))
        await beside.execute(
            delete(quarantine).where(quarantine.c.run.in_(json_rows.among(quarantine.c.run, went, kind)))
        )
        await beside.commit()
    return went


async def retry_from_the_beginning(ledger: Database, application: Database, run_id: str, by: str) -> None:
    """The same as `again` for one run. Raises UnknownRun, and WrongState for one that is not over."""
    if not await again(ledger, application, [run_id], Rank.MANUAL, by):
        async with ledger.reader.connect() as connection:
            raise await _refusal(connection, run_id)


async def _refusal(connection: AsyncConnection, run_id: str, hint: str = "") -> UnknownRun | WrongState:
    row = await runs.get(connection, run_id)
    if row is None:
        return UnknownRun(f"there is no run {run_id}")
    if row["state"] in ACTIVE:
        return WrongState(f"the run {run_id} is {row['state']}: it is not over, so it goes on by itself")
    return WrongState(f"the run {run_id} has {row['state']}" + (f"; {hint}" if hint else ""))
