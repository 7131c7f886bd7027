"""get_db(): the authors' way to the application's database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from weakref import WeakKeyDictionary

from sqlalchemy.ext.asyncio import AsyncSession

from service.config import get_settings
from service.database.engine import Database

# Connections belong to an event loop, so each loop has its own: a service's, or one made from the setting.
_services: WeakKeyDictionary[asyncio.AbstractEventLoop, Database] = WeakKeyDictionary()
_made: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[str, Database]] = WeakKeyDictionary()

Prepare = Callable[[Database], None]
_prepare: Prepare | None = None


@asynccontextmanager
async def get_db(readonly: bool = False) -> AsyncIterator[AsyncSession]:
    """A session on the application's database: `async with get_db() as db: …; await db.commit()`.

    It never commits by itself, and rolls back what was not committed when the block ends or raises.
    On SQLite a writing session takes the file's one write lock at its first statement: open it late, commit early,
    and use `readonly=True` for reading; a second writing session inside one run raises SecondWriter.
    """
    async with application_database().session(readonly) as session:
        yield session


def application_database() -> Database:
    """The application's database on this event loop; outside a service it keeps no connection between uses."""
    loop = asyncio.get_running_loop()
    if (own := _services.get(loop)) is not None:
        return own
    settings = get_settings()
    url, shows = settings.DATABASE_URL, settings.BATCH_SHOW_SQL_PARAMETERS
    known, database = _made.get(loop, (None, None))
    if database is None or known != url:
        database = Database(url, setting="DATABASE_URL", pooled=False, shows_values=shows)
        if _prepare is not None:
            _prepare(database)
        _made[loop] = url, database
    return database


def use_application_database(database: Database | None, prepare: Prepare | None = None) -> None:
    """Make `get_db()` on this event loop use this database; None: back to one made from the settings.

    `prepare` is called with it, and with those that are made for other loops of this process from now on.
    """
    global _prepare
    loop = asyncio.get_running_loop()
    _prepare = prepare
    if database is None:
        _services.pop(loop, None)
        return
    if prepare is not None:
        prepare(database)
    _services[loop] = database
