"""A run that is over goes on, because a person wants it: a new attempt of the same run, in the queue."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Text, bindparam, delete, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import database_time, json_rows, runs
from service.batch.ledger.states import ACTIVE, FINAL, Rank, RunState
from service.batch.ledger.tables import runs as runs_table
from service.database.companions import checkpoints, quarantine
from service.database.engine import Database
from service.errors import InvalidParameters, UnknownRun

RETRIED = (RunState.FAILED, RunState.CANCELLED, RunState.SKIPPED)


async def retry(connection: AsyncConnection, run_id: str, by: str) -> None:
    """Give a failed, cancelled or skipped run a new attempt, which goes on from its checkpoints.

    Raises UnknownRun, and InvalidParameters that names the state of a run that has succeeded or is not over.
    """
    if not await reopen(connection, [run_id], RETRIED, Rank.MANUAL, by):
        raise await _refusal(connection, run_id, "`--again` runs it from the beginning")


async def again(ledger: Database, application: Database, ids: Sequence[str], rank: int, by: str) -> set[str]:
    """Give runs that are over a new attempt from the beginning: what they did is done again. Returns their ids.

    Their checkpoints are cleared in the application's database. Should the process die between the two commits, a run
    stays over, without them.
    """
    async with application.engine.connect() as beside, ledger.engine.begin() as connection:
        # SQLite's write lock, which may have to be waited for, before that of the ledger, which nobody holds for long.
        await beside.execute(text("SELECT 1"))
        went = await reopen(connection, ids, FINAL, rank, by, anew=True)
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
    """The same as `again` for one run. Raises UnknownRun, and InvalidParameters for one that is not over."""
    if not await again(ledger, application, [run_id], Rank.MANUAL, by):
        async with ledger.reader.connect() as connection:
            raise await _refusal(connection, run_id)


async def reopen(
    connection: AsyncConnection, ids: Sequence[str], states: Sequence[RunState], rank: int, by: str, anew: bool = False
) -> set[str]:
    """Queue those of these runs that are in one of these final states; their fences go on rising. Returns their ids.

    `anew`: how far they were is forgotten. Attempts and losses are counted anew, against what their tasks allow.
    They count as caught up from now on, so that they don't stand in the way of a slot that is on time.
    """
    kind = connection.dialect.name
    final = ", ".join(f"'{state}'" for state in states)  # by the index on states SQLite would read all of them
    forgotten = "".join(f"{name} = NULL, " for name in runs.PROGRESS_COLUMNS) if anew else ""
    wanted = f"id IN (SELECT v.id FROM {json_rows.source([runs_table.c.id], kind)}) AND (state || '') IN ({final})"
    statement = text(
        "UPDATE batch_runs SET state = 'queued', rank = :rank, catch_up = true, due_at = :now, requested_by = :by, "
        "reason = NULL, result = NULL, started_at = NULL, finished_at = NULL, "
        "attempts_before = attempt, losses = 0, count_lost = NULL, "
        f"{forgotten}cancel_at = NULL, cancel_by = NULL, cancel_reason = NULL "
        f"WHERE {runs.locked_by_id(wanted, kind)} RETURNING id"
    ).bindparams(bindparam("now", type_=runs_table.c.due_at.type), bindparam("by", type_=Text()))
    values = {"rows": json_rows.encode([{"id": i} for i in ids], kind), "rank": rank, "by": by}
    found = await connection.execute(
        statement.columns(runs_table.c.id), {**values, "now": await database_time.now_of(connection)}
    )
    return set(found.scalars())


async def _refusal(connection: AsyncConnection, run_id: str, hint: str = "") -> UnknownRun | InvalidParameters:
    row = await runs.get(connection, run_id)
    if row is None:
        return UnknownRun(f"there is no run {run_id}")
    if row["state"] in ACTIVE:
        return InvalidParameters(f"the run {run_id} is {row['state']}: it is not over, so it goes on by itself")
    return InvalidParameters(f"the run {run_id} has {row['state']}" + (f"; {hint}" if hint else ""))
