"""Starts that become one run: those of one key that come shortly after each other (`debounce`), and
those of which one counts in a window of time (`once_in`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from sqlalchemy import Column, Index, PrimaryKeyConstraint, String, Table, delete
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.selectable import TextualSelect

from batch_system.batch.ledger import runs as run_table
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.tables import PLAIN_STATE, ledger, runs
from batch_system.database import sql
from batch_system.database.types import Id, UtcDateTime


class MergeKind(StrEnum):
    DEBOUNCE = "debounce"
    WINDOW = "once_in"


# `run`: the one that counts. `until`: when a debounced run opens at the latest, or when the window
# ends.
merges = Table(
    "batch_merges",
    ledger,
    Column("task", String(100), nullable=False),
    Column("kind", String(10), nullable=False),
    Column("key", String(200), nullable=False),
    Column("run", Id, nullable=False),
    Column("until", UtcDateTime, nullable=False),
    PrimaryKeyConstraint("task", "kind", "key"),
    Index("ix_batch_merges_until", "until"),
)

# The ids of starts that were handed over and merged, so that none is merged twice.
merged = Table(
    "batch_merged",
    ledger,
    Column("id", Id, primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Index("ix_batch_merged_at", "at"),
)


KEPT = timedelta(days=1)
"""A window is known for so long after its end: starts that were made in it may be handed over late.
"""


@dataclass(frozen=True)
class Merged:
    """`run`: the id of the run that counts. `is_new`: whether it is the new one. `until`: when it
    opens, or when the window ends.
    """

    run: str
    is_new: bool
    until: datetime


_INSERT = (
    "INSERT INTO batch_merges (task, kind, key, run, until) "
    "VALUES (:task, :kind, :key, :run, :until) "
)

_LOCK = sql.statement(
    f"{_INSERT}ON CONFLICT (task, kind, key) DO UPDATE SET until = batch_merges.until "
    "RETURNING run, until",
    run=merges.c.run,
    until=merges.c.until,
).columns(merges.c.run, merges.c.until)
"""The row of a key, which is locked until the end of the transaction. It is made if there is none.
"""
_REPLACE = sql.statement(
    "UPDATE batch_merges SET run = :run, until = :until "
    "WHERE task = :task AND kind = :kind AND key = :key",
    run=merges.c.run,
    until=merges.c.until,
)
_OPEN_WINDOW = sql.statement(
    f"{_INSERT}ON CONFLICT (task, kind, key) DO UPDATE SET run = excluded.run, "
    "until = excluded.until WHERE batch_merges.until <= :at RETURNING run, until",
    run=merges.c.run,
    until=merges.c.until,
    at=merges.c.until,
).columns(merges.c.run, merges.c.until)
_WINDOW = sql.statement(
    "SELECT run, until FROM batch_merges WHERE task = :task AND kind = :kind AND key = :key"
).columns(merges.c.run, merges.c.until)


def _postpone(kind: str) -> TextualSelect:
    least, greatest = ("min", "max") if kind == "sqlite" else ("least", "greatest")
    is_waiting = f"{PLAIN_STATE} = 'waiting' AND attempt = 0 AND gate IS NULL"
    return sql.statement(
        "UPDATE batch_runs SET params = :params, slot = :slot, "
        f"due_at = {least}({greatest}(due_at, :due_at), :until) "
        f"WHERE id = :run AND {is_waiting} RETURNING due_at",
        params=runs.c.params,
        slot=runs.c.slot,
        due_at=runs.c.due_at,
        until=runs.c.due_at,
        run=runs.c.id,
    ).columns(runs.c.due_at)


_POSTPONE = {kind: _postpone(kind) for kind in ("sqlite", "postgresql")}
"""Give a run that still waits the newest parameters, and let it wait longer."""


async def debounce(connection: AsyncConnection, new: NewRun, key: str, until: datetime) -> Merged:
    """Merge a new run, which waits, with the one that waits for the same key, or insert it.

    The run that waits gets the parameters and the slot of the new one. It opens when the new one
    would, but at `until` of the first one at the latest. The row of the key is locked before the
    run, whose opener locks only the run.
    """
    values = {"task": new.task, "kind": MergeKind.DEBOUNCE, "key": key, "until": until}
    row = (await connection.execute(_LOCK, {**values, "run": new.id})).one()
    if row.run != new.id:
        postponed = {
            "params": new.params,
            "slot": new.slot,
            "due_at": new.due_at,
            "until": row.until,
            "run": row.run,
        }
        postpone = _POSTPONE[connection.dialect.name]
        if (found := (await connection.execute(postpone, postponed)).first()) is not None:
            return Merged(row.run, False, found.due_at)
        await connection.execute(_REPLACE, {**values, "run": new.id})
    await run_table.insert_group(connection, [new])
    return Merged(new.id, True, new.due_at)


async def once_in(connection: AsyncConnection, new: NewRun, key: str, until: datetime) -> Merged:
    """Insert a new run, and open the window of its key until `until`, unless one was open when it
    was requested: many starts may be handed over long after the windows in which they were.
    """
    values = {"task": new.task, "kind": MergeKind.WINDOW, "key": key}
    opened = await connection.execute(
        _OPEN_WINDOW, {**values, "run": new.id, "until": until, "at": new.created_at}
    )
    if opened.first() is not None:
        await run_table.insert_group(connection, [new])
        return Merged(new.id, True, until)
    row = (await connection.execute(_WINDOW, values)).one()
    return Merged(row.run, False, row.until)


async def is_first(connection: AsyncConnection, start: str, at: datetime) -> bool:
    """Whether this start has not been handed over before. It counts as handed over from now on."""
    first = sql.statement(
        "INSERT INTO batch_merged (id, at) VALUES (:id, :at) ON CONFLICT (id) DO NOTHING",
        id=merged.c.id,
        at=merged.c.at,
    )
    return (await connection.execute(first, {"id": start, "at": at})).rowcount == 1


async def prune(connection: AsyncConnection, ended: datetime, before: datetime) -> None:
    """Delete keys whose time was over at `ended`, and the starts that were handed over before
    `before`.
    """
    await connection.execute(delete(merges).where(merges.c.until < ended))
    await connection.execute(delete(merged).where(merged.c.at < before))
