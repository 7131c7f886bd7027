"""Retrying a run: a person queues an ended run for a new attempt, from its checkpoints or from the beginning."""

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
    """Queue a failed, cancelled or skipped run for a new attempt, which goes on from its checkpoints.

    Raises UnknownRun, and WrongState if the run has succeeded or has not ended.
    """
    if not await transitions.reopen(connection, [run_id], Rank.MANUAL, by, await database_time.now_of(connection)):
        raise await _refusal(connection, run_id, "`--again` runs it from the beginning")


async def again(ledger: Database, application: Database, ids: Sequence[str], rank: int, by: str) -> set[str]:
    """Queue those of the runs `ids` that have ended for a new attempt from the beginning. Returns their ids.

    Their checkpoints and their items in quarantine are deleted from the application database. If the process dies
    between the two commits, the runs have still ended, and their checkpoints are gone.
    """
    async with application.engine.connect() as data, ledger.engine.begin() as connection:
        # Wait for the write lock of the application's SQLite file before taking that of the ledger's file.
        await data.execute(text("SELECT 1"))
        now = await database_time.now_of(connection)
        reopened = await transitions.reopen(connection, ids, rank, by, now, anew=True)
        kind = application.kind
        is_theirs = checkpoints.c.run.in_(json_rows.among(checkpoints.c.run, reopened, kind))
        # The row without a name is the fence of the run. It is kept, so that a lost attempt still can't commit.
        await data.execute(delete(checkpoints).where(is_theirs, checkpoints.c.name != ""))
        await data.execute(
            delete(quarantine).where(quarantine.c.run.in_(json_rows.among(quarantine.c.run, reopened, kind)))
        )
        await data.commit()
    return reopened


async def retry_from_the_beginning(ledger: Database, application: Database, run_id: str, by: str) -> None:
    """Do the same as `again` for one run. Raises UnknownRun, and WrongState if the run has not ended."""
    if not await again(ledger, application, [run_id], Rank.MANUAL, by):
        async with ledger.reader.connect() as connection:
            raise await _refusal(connection, run_id)


async def _refusal(connection: AsyncConnection, run_id: str, hint: str = "") -> UnknownRun | WrongState:
    row = await runs.get(connection, run_id)
    if row is None:
        return UnknownRun(f"there is no run {run_id}")
    if row["state"] in ACTIVE:
        return WrongState(f"the run {run_id} is {row['state']}: it has not ended, so it goes on by itself")
    return WrongState(f"the run {run_id} has {row['state']}" + (f"; {hint}" if hint else ""))
