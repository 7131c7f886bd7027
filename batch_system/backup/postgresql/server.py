"""A restore's connections to a PostgreSQL server: settings, locks, the commit, and messages for the
server's errors.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import asyncpg
from sqlalchemy.engine import URL

from batch_system import clock
from batch_system.backup.postgresql import snapshot
from batch_system.database import troubles
from batch_system.database.urls import connect_arguments, safe_url
from batch_system.errors import BackupError

LOCK_SECONDS = 10
"""How long a restore waits for a lock. Other sessions that want the table wait behind it, so it
must be short.
"""
ASK_AGAIN_SECONDS = 0.2
ASK_TIMES = 25

# Values are read with the settings that they were written with. The search path of the role is
# kept, because functions in checks and defaults may need it.
SETTINGS = {
    "row_security": "off",
    "timezone": "UTC",
    "datestyle": "ISO",
    "intervalstyle": "postgres",
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "lock_timeout": f"{LOCK_SECONDS}s",
    "application_name": "batch/restore",
}

VALUES_OF_A_KEY = re.compile(r"=\(.*\)")

HOLDERS = """
SELECT a.pid, a.usename, a.application_name, l.relation::pg_catalog.regclass::text AS relation
FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a USING (pid)
WHERE l.granted AND l.relation = ANY($1::oid[]) AND a.pid <> pg_catalog.pg_backend_pid()
  AND l.database = (
      SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()
  )
ORDER BY a.xact_start NULLS LAST, a.pid LIMIT 1
"""


@asynccontextmanager
async def connected(url: URL) -> AsyncIterator[Any]:
    """A connection with the settings of a restore."""
    async with snapshot.connected(
        connect_arguments(url), SETTINGS, f"the URL of {safe_url(url)}"
    ) as connection:
        yield connection


@contextmanager
def explained(url: URL) -> Iterator[None]:
    """Turn an error of the server or of the network in the block into a BackupError."""
    try:
        yield
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise BackupError(
            f"nothing was restored into {safe_url(url)}, which is as it was: {cause_of(error)}. "
            "Look at the server."
        ) from error


def cause_of(error: BaseException) -> str:
    """The message of an error in one line, with the server's detail, and without values of rows."""
    cause = troubles.without_data(error, (str(error) or type(error).__name__).splitlines()[0])
    detail = (getattr(error, "detail", None) or "").partition("\n")[0]
    if not detail or detail.startswith("Failing row"):
        return cause
    return f"{cause} ({VALUES_OF_A_KEY.sub('', detail)})"


async def lock(connection: Any, url: URL, relations: Sequence[tuple[int, str]]) -> None:
    """Lock these tables (oid, name as SQL) exclusively. Raises BackupError, which names the session
    that uses one.
    """
    if not relations:
        return
    names = ", ".join(name for _, name in relations)
    until = clock.monotonic() + LOCK_SECONDS
    while True:
        try:
            async with connection.transaction():
                await connection.execute(f"LOCK TABLE {names} IN ACCESS EXCLUSIVE MODE")
            return
        except (
            asyncpg.DeadlockDetectedError
        ) as error:  # a session with one table waits for another: let it go first
            if clock.monotonic() >= until:
                raise await _in_use(url, relations) from error
        except asyncpg.LockNotAvailableError as error:
            raise await _in_use(url, relations) from error


async def _in_use(url: URL, relations: Sequence[tuple[int, str]]) -> BackupError:
    async with connected(url) as other:
        holder = await other.fetchrow(HOLDERS, [oid for oid, _ in relations])
    cause = (
        f"{holder['relation']} is in use by {holder['application_name'] or 'a session'} of "
        f"{holder['usename']} (pid {holder['pid']})"
        if holder
        else "a table was in use"
    )
    return BackupError(
        f"nothing was restored into {safe_url(url)}: {cause}, and was not released within "
        f"{LOCK_SECONDS} s. End that session, or try again later"
    )


async def commit(connection: Any, url: URL, transaction: Any, number: str) -> None:
    """Commit. If the connection is lost meanwhile, ask the server whether the transaction was
    committed.

    `number`: the transaction's id (xid8). Raises BackupError if the server does not answer that
    either.
    """
    try:
        await transaction.commit()
    except (
        OSError,
        asyncpg.PostgresConnectionError,
        asyncpg.InterfaceError,
        asyncpg.AdminShutdownError,
    ) as error:
        state = await _state_of_transaction(url, number)
        if state == "committed":
            return
        if state != "aborted":
            raise BackupError(
                f"the connection to {safe_url(url)} was lost during the commit of the restore, so "
                "it is not known whether it was committed: look at the rows when the server is "
                "back"
            ) from error
        raise


async def _state_of_transaction(url: URL, number: str) -> str | None:
    """`committed` or `aborted`; None if the server does not say so within ASK_TIMES attempts."""
    for _ in range(ASK_TIMES):
        try:
            async with connected(url) as other:
                state: str | None = await other.fetchval(
                    "SELECT pg_catalog.pg_xact_status($1::text::xid8)", number
                )
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            state = None
        if state in ("committed", "aborted"):
            return state
        await asyncio.sleep(ASK_AGAIN_SECONDS)
    return None


LastCheck = Callable[[], Coroutine[Any, Any, None]]
"""Awaited when no other connection can write to the tables any more. Raises BackupError to prevent
the restore.
"""
