"""What the watch and people write on runs about incidents: that runs are noticed, made good or
acknowledged.

Only transitions.py writes a state.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.tables import OPEN_FAILURE_SQL, runs
from batch_system.database import sql

NAMES = ("fingerprint", "acknowledged", "made_good_at", "made_good_by")


async def mark(
    connection: AsyncConnection, ids: Collection[str], values: Mapping[str, str | datetime | None]
) -> int:
    """Write these values, by the names in NAMES, to the rows of these runs. Returns how many rows
    there are.
    """
    if wrong := values.keys() - set(NAMES):
        raise ValueError(f"no marks of a run: {', '.join(sorted(wrong))}")
    if not ids:
        return 0
    kind = connection.dialect.name
    assigned = ", ".join(f"{name} = :{name}" for name in values)
    statement = sql.statement(
        f"UPDATE batch_runs SET {assigned} WHERE {json_rows.is_of_ids('id', kind)}",
        **{name: runs.c[name] for name in values},
    )
    given = json_rows.of_ids(sorted(ids), kind) | dict(values)
    return (await connection.execute(statement, given)).rowcount


async def good_by_themselves(
    connection: AsyncConnection, ids: Collection[str], now: datetime
) -> None:
    """Record that nothing is wrong any more with these runs, which have succeeded after a person
    retried them.
    """
    kind = connection.dialect.name
    statement = sql.statement(
        "UPDATE batch_runs SET fingerprint = NULL, made_good_at = :now, made_good_by = id "
        f"WHERE {json_rows.is_of_ids('id', kind)}",
        now=runs.c.made_good_at,
    )
    if ids:
        await connection.execute(statement, json_rows.of_ids(sorted(ids), kind) | {"now": now})


async def made_good(connection: AsyncConnection, by_run: Mapping[str, str], now: datetime) -> None:
    """Write which runs have made which others good, if these are still open."""
    if not by_run:
        return
    kind = connection.dialect.name
    source = json_rows.source([runs.c.id, runs.c.made_good_by], kind)
    still_open = " AND ".join(f"batch_runs.{part}" for part in OPEN_FAILURE_SQL.split(" AND "))
    statement = sql.statement(
        f"UPDATE batch_runs SET made_good_at = :now, made_good_by = v.made_good_by FROM {source} "
        f"WHERE batch_runs.id = v.id AND {still_open}",
        now=runs.c.made_good_at,
    )
    rows = [{"id": failure, "made_good_by": success} for failure, success in sorted(by_run.items())]
    await connection.execute(statement, {"rows": json_rows.encode(rows, kind), "now": now})


async def reopen_acknowledged(connection: AsyncConnection, incident: str) -> int:
    """Let the runs that were acknowledged with this incident count as open again. Returns how many
    there are.
    """
    statement = sql.statement(
        "UPDATE batch_runs SET acknowledged = NULL WHERE acknowledged = :incident",
        incident=runs.c.acknowledged,
    )
    return (await connection.execute(statement, {"incident": incident})).rowcount
