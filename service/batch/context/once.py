"""For what can't share a transaction with its run's place: do it once by a key, or let the other side see to it."""

from __future__ import annotations

from sqlalchemy import bindparam, text
from sqlalchemy.ext.asyncio import AsyncSession

from service import clock
from service.batch.context.current_run import current_run
from service.database.companions import once as once_table
from service.errors import BatchError

LONGEST_KEY = 200

CLAIM = text(
    "INSERT INTO batch_once (key, run, at) VALUES (:key, :run, :at) ON CONFLICT (key) DO NOTHING RETURNING key"
).bindparams(*(bindparam(name, type_=once_table.c[name].type) for name in ("run", "at")))


async def once(db: AsyncSession, key: str) -> bool:
    """True for the first transaction with this key that commits; False for each later one, in whatever run.

    `if await once(db, f"invoice-{invoice.id}"): …` Whoever asks at the same time waits for the first one's commit.
    A key is forgotten when the run that used it is pruned. Raises BatchError outside a run.
    """
    if not 0 < len(key) <= LONGEST_KEY:
        raise BatchError(f"once() was given a key of {len(key)} characters; allowed: 1 to {LONGEST_KEY}")
    found = await db.execute(CLAIM, {"key": key, "run": current_run().id, "at": clock.now()})
    return found.first() is not None
