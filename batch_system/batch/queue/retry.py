"""Retrying a run: a person queues an ended run for a new attempt, from its checkpoints or from the
beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import (
    database_time,
    json_rows,
    runs,
    schedules,
    tables,
    transitions,
    waits,
)
from batch_system.batch.ledger.parts import PartsGate
from batch_system.batch.ledger.states import ACTIVE, FINAL, Origin, Rank, RunState
from batch_system.batch.tasks.after import After
from batch_system.database.companions import checkpoints, quarantine
from batch_system.database.engine import Database
from batch_system.errors import UnknownRun, WrongState


async def retry(connection: AsyncConnection, run_id: str, by: str) -> None:
    """Queue a failed, cancelled or skipped run for a new attempt, which goes on from its
    checkpoints.

    Raises UnknownRun, and WrongState if the run has succeeded or has not ended.
    """
    if not await transitions.reopen(
        connection, [run_id], Rank.MANUAL, by, await database_time.now_of(connection)
    ):
        raise await _refusal(connection, run_id, "`--again` runs it from the beginning")


async def again(
    ledger: Database,
    application: Database,
    ids: Sequence[str],
    rank: int,
    by: str,
    after: Sequence[str] = (),
) -> set[str]:
    """Queue those of the runs `ids` that have ended for a new attempt from the beginning. Returns
    their ids.

    Their checkpoints and their items in quarantine are deleted from the application database. If
    the process dies between the two commits, the runs stay ended, without their checkpoints.
    `after`: runs that have to wait again for the runs that they come after; if there are `ids`,
    only if one of these was queued.
    """
    async with application.engine.connect() as data, ledger.engine.begin() as connection:
        # Wait for the write lock of the application's SQLite file before taking that of the
        # ledger's file.
        await data.execute(text("SELECT 1"))
        now = await database_time.now_of(connection)
        awaiting = await waits.lock_awaiting(connection, [*ids, *after]) if after else []
        reopened = (
            await transitions.reopen(connection, ids, rank, by, now, anew=True) if ids else set()
        )
        if after and (reopened or not ids):
            gated = await _gated(connection, after, now)
            reopened |= await transitions.wait_anew(connection, gated, rank, by, now, awaiting)
        kind = application.kind
        is_theirs = checkpoints.c.run.in_(json_rows.among(checkpoints.c.run, reopened, kind))
        # The row without a name is the fence of the run. It is kept, so that a lost attempt still
        # can't commit.
        await data.execute(delete(checkpoints).where(is_theirs, checkpoints.c.name != ""))
        await data.execute(
            delete(quarantine).where(
                quarantine.c.run.in_(json_rows.among(quarantine.c.run, reopened, kind))
            )
        )
        await data.commit()
    return reopened


async def _gated(
    connection: AsyncConnection, ids: Sequence[str], now: datetime
) -> list[dict[str, Any]]:
    """What opens each of the runs `ids`, and when it has waited long enough, by the present
    declarations of their tasks.
    """
    opened = await schedules.open_schedules(connection)
    rules = {name: After.from_json(row.after) for name, row in opened.items()}
    columns = [tables.runs.c[name] for name in ("id", "task", "origin", "gate")]
    theirs = tables.runs.c.id.in_(json_rows.among(tables.runs.c.id, ids, connection.dialect.name))
    gated = []
    for run in await connection.execute(select(*columns).where(theirs)):
        # A follow-up waits only for its group.
        rule = rules.get(run.task) if run.origin != Origin.MANUAL else None
        until = now + timedelta(seconds=rule.within) if rule is not None else None
        own = None if run.gate in tuple(PartsGate) else run.gate
        gate = rule.on if rule is not None else own or str(waits.Gate.SUCCESS)
        gated.append({"id": run.id, "gate": gate, "wait_until": until})
    return gated


async def comes_after(connection: AsyncConnection, run_id: str) -> dict[str, list[str]]:
    """The runs that come after a run and have ended, by the names of their tasks."""
    ids = await waits.coming_after(connection, [run_id])
    found: dict[str, list[str]] = {}
    theirs = tables.runs.c.id.in_(json_rows.among(tables.runs.c.id, ids, connection.dialect.name))
    query = select(tables.runs.c.id, tables.runs.c.task).where(
        theirs, text(tables.is_one_of(FINAL))
    )
    for row in await connection.execute(query.order_by(tables.runs.c.id)):
        found.setdefault(row.task, []).append(row.id)
    return dict(sorted(found.items()))


async def retry_from_the_beginning(
    ledger: Database, application: Database, run_id: str, by: str, after: Sequence[str] = ()
) -> None:
    """Do the same as `again` for one run. Raises UnknownRun, and WrongState if the run has not
    ended.
    """
    if not await again(ledger, application, [run_id], Rank.MANUAL, by, after):
        async with ledger.reader.connect() as connection:
            raise await _refusal(connection, run_id)


async def _refusal(
    connection: AsyncConnection, run_id: str, hint: str = ""
) -> UnknownRun | WrongState:
    row = await runs.get(connection, run_id)
    if row is None:
        return UnknownRun(f"there is no run {run_id}")
    if row["state"] in ACTIVE:
        return WrongState(
            f"the run {run_id} is {row['state']}: it has not ended, so it goes on by itself"
        )
    if row["origin"] == Origin.PART:
        parent = row["awaited_by"]
        return WrongState(
            f"the run {run_id} is part {row['part']} of run {parent}, which has ended: retry that "
            "run"
        )
    if row["gate"] in tuple(PartsGate) and row["state"] != RunState.SUCCEEDED:
        return WrongState(
            f"parts of the run {run_id} have not ended yet: `batch runs --parent {run_id}` shows "
            "them"
        )
    return WrongState(f"the run {run_id} has {row['state']}" + (f"; {hint}" if hint else ""))
