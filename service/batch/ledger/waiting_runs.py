"""Runs that wait for others are found and locked here, before something that they wait for
changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import json_rows, queues
from service.batch.ledger.tables import ACTIVE_SQL, OF_SLOT_SQL, runs


async def lock_awaiting(connection: AsyncConnection, ids: Sequence[str]) -> list[str]:
    """Lock the runs that wait, or waited, for the runs `ids`, and these too. Returns the ids of the
    former.

    Whoever makes an ended run active again calls this before: then nobody can open or close what
    waits for it by the state from before. A run that was closed is active again too when it waits
    again, so among them are also the runs that wait for such a one, in whichever depth.
    """
    found = set(await _awaiting(connection, ids))
    deeper = found
    while deeper:
        deeper = set(await _awaiting(connection, sorted(deeper), _MAY_WAIT_AGAIN)) - found
        found |= deeper
    if found:
        await _lock(connection, found.union(ids))
    return sorted(found)


async def lock_with_members(connection: AsyncConnection, ids: Sequence[str]) -> None:
    """Lock the runs `ids` and the active members of their groups, if there are any, all of them by
    their ids.

    Whoever cancels groups calls this before. In two steps, first the follow-ups and then their
    members, two of them could deadlock.
    """
    if (kind := connection.dialect.name) != "postgresql":
        return
    meant = queues.among(
        "m.awaited_by", f"SELECT v.id FROM {json_rows.source([runs.c.id], kind)}", kind
    )
    members = text(f"SELECT m.id FROM batch_runs m WHERE {meant} AND m.{ACTIVE_SQL}").columns(
        runs.c.id
    )
    found: set[str] = set()
    deeper = set(ids)
    while deeper:
        deeper = (
            set((await connection.execute(members, json_rows.of_ids(deeper, kind))).scalars())
            - found
        )
        found |= deeper
    if found:
        await _lock(connection, found.union(ids))


async def _lock(connection: AsyncConnection, ids: Iterable[str]) -> None:
    if (kind := connection.dialect.name) == "postgresql":
        locked = queues.among("id", f"SELECT v.id FROM {json_rows.source([runs.c.id], kind)}", kind)
        statement = text(f"SELECT id FROM batch_runs WHERE {locked} ORDER BY id FOR UPDATE")
        await connection.execute(statement, json_rows.of_ids(ids, kind))


_MAY_WAIT_AGAIN = " AND coalesce(a.state, '') IN ('waiting', 'skipped') AND a.gate IS NOT NULL"
"""Runs `a` that were closed by what they waited for, or may be closed at this moment."""


async def _awaiting(
    connection: AsyncConnection, ids: Sequence[str], are: str = ""
) -> Sequence[str]:
    """The runs that wait, or waited, for those of the runs `ids` that fulfil the condition
    `are`.
    """
    kind = connection.dialect.name
    source = json_rows.source([runs.c.id], kind)
    meant = queues.among("a.id", f"SELECT v.id FROM {source}", kind)
    statement = text(
        f"SELECT a.awaited_by AS id FROM batch_runs a WHERE {meant}{are} "
        f"UNION SELECT w.run FROM batch_runs a CROSS JOIN batch_waits w "
        f"WHERE {meant}{are} AND a.{OF_SLOT_SQL} AND w.task = a.task AND w.slot = a.slot"
    ).columns(runs.c.id)
    found = (await connection.execute(statement, json_rows.of_ids(ids, kind))).scalars()
    return [run for run in found if run is not None]


async def coming_after(connection: AsyncConnection, ids: Sequence[str]) -> list[str]:
    """The runs that wait, or have waited, for the runs `ids`, and those that wait for these, in
    whichever depth.
    """
    found: set[str] = set(ids)
    asked = list(ids)
    while asked:
        asked = sorted(set(await _awaiting(connection, asked)) - found)
        found |= set(asked)
    return sorted(found - set(ids))
