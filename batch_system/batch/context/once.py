"""once(): for work that only one transaction may do, although a run may be repeated or run
twice.
"""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession

from batch_system import clock
from batch_system.batch.context.current_run import current_run
from batch_system.database import sql
from batch_system.database.companions import once as once_table
from batch_system.errors import BatchError

LONGEST_KEY = 200

CLAIM = sql.statement(
    "INSERT INTO batch_once (key, run, at) VALUES (:key, :run, :at) ON CONFLICT (key) DO NOTHING "
    "RETURNING key",
    run=once_table.c.run,
    at=once_table.c.at,
)


async def once(db: AsyncSession, key: str) -> bool:
    """Whether this is the first transaction with this key that commits. False for all later ones,
    of any run.

    `if await once(db, f"invoice-{invoice.id}"): …` If two transactions use a key at the same time,
    the second waits until the first ends. `key`: 1 to 200 characters. It is deleted when the run
    that used it is pruned. Raises BatchError for another length, and outside a run.
    """
    if not 0 < len(key) <= LONGEST_KEY:
        raise BatchError(
            f"once() was given a key of {len(key)} characters; allowed: 1 to {LONGEST_KEY}"
        )
    inserted = await db.execute(CLAIM, {"key": key, "run": current_run().id, "at": clock.now()})
    return inserted.first() is not None
