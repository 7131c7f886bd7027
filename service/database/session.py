"""get_db(): the authors' way to the application's database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy.ext.asyncio import AsyncSession

from service.database.engine import Database

Loop = asyncio.AbstractEventLoop
Prepare = Callable[[Database], None]


class _Origin(NamedTuple):
    """What a database is made from where there is no service's: its URL, and what is done to it first."""

    url: str
    prepare: Prepare | None


# Connections belong to an event loop, so each loop has its own: those of the services on it, or one that is made.
_services: WeakKeyDictionary[Loop, dict[Database, _Origin]] = WeakKeyDictionary()
_made: WeakKeyDictionary[Loop, tuple[_Origin, Database]] = WeakKeyDictionary()

_origin: ContextVar[_Origin | None] = ContextVar("origin", default=None)


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
    from service.config import get_settings

    loop = asyncio.get_running_loop()
    if services := _services.get(loop):
        return next(reversed(services))
    origin = _origin.get() or _Origin(get_settings().DATABASE_URL, None)
    known, database = _made.get(loop, (None, None))
    if database is None or known != origin:
        database = Database(
            origin.url,
            setting="DATABASE_URL",
            pooled=False,
            shows_values=get_settings().BATCH_SHOW_SQL_PARAMETERS,
        )
        if origin.prepare is not None:
            origin.prepare(database)
        _made[loop] = origin, database
    return database


def use_application_database(database: Database, prepare: Prepare | None = None) -> None:
    """Make `get_db()` on this event loop use a service's database, until `leave_application_database`.

    `prepare` is called with it, and with each one that a run needs elsewhere, which `bind_to_service` says.
    """
    loop = asyncio.get_running_loop()
    if prepare is not None:
        prepare(database)
    origin = _Origin(database.url.render_as_string(hide_password=False), prepare)
    _services.setdefault(loop, {})[database] = origin


def leave_application_database(database: Database) -> None:
    """The service of this loop that used it has ended; another one on this loop keeps its own."""
    del _services[asyncio.get_running_loop()][database]


def bind_to_service() -> None:
    """What this context opens where no service is, it opens as this loop's service does: in a thread with an event loop
    of its own, and here after the service's end."""
    if services := _services.get(asyncio.get_running_loop()):
        _origin.set(next(reversed(services.values())))
