"""Locks by name, which a transaction holds until its end, and no other transaction waits for."""

from __future__ import annotations

import json
from collections.abc import Collection

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

# A process that is frozen now would keep the locks.
_LOCK = text(
    "SELECT v.name, pg_try_advisory_xact_lock(hashtextextended(v.name, 0)) FROM "
    "(SELECT set_config('idle_in_transaction_session_timeout', '2s', true)) AS s, "
    "jsonb_array_elements_text(CAST(:names AS jsonb)) AS v(name)"
)


async def held_elsewhere(connection: AsyncConnection, names: Collection[str]) -> set[str]:
    """Lock these names. Returns those that another transaction holds, which are not locked.

    On PostgreSQL the server ends the transaction if it is idle for two seconds. On SQLite there is
    one writer at a time, so nothing has to be locked.
    """
    if connection.dialect.name != "postgresql" or not names:
        return set()
    rows = await connection.execute(_LOCK, {"names": json.dumps(sorted(names))})
    return {name for name, is_mine in rows if not is_mine}
