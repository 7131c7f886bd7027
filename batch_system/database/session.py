"""get_db(): sessions on the application's database for authors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy.ext.asyncio import AsyncSession

from batch_system.database.changes import has_changes, track
from batch_system.database.engine import Database
from batch_system.database.writers import caller, session_place
from batch_system.logs import get_logger, run_log

logger = get_logger(__name__)

Loop = asyncio.AbstractEventLoop
Prepare = Callable[[Database], None]


class _Origin(NamedTuple):
    """How to open the application's database outside a service: its URL, and a function that
    prepares it.
    """

    url: str
    prepare: Prepare | None


# Connections belong to an event loop, so each loop has databases of its own: those of its services,
# or a new one.
_services: WeakKeyDictionary[Loop, dict[Database, _Origin]] = WeakKeyDictionary()
_opened: WeakKeyDictionary[Loop, tuple[_Origin, Database]] = WeakKeyDictionary()

_origin: ContextVar[_Origin | None] = ContextVar("origin", default=None)


@asynccontextmanager
async def get_db(readonly: bool = False) -> AsyncIterator[AsyncSession]:
    """Open a session on the application's database: `async with get_db() as db: …; await
    db.commit()`.

    It never commits by itself. Uncommitted changes are rolled back when the block ends or raises.
    On SQLite a writing session takes the file's write lock at its first statement: open it late,
    commit early, and use `readonly=True` for reading. A second writing session within one run
    raises SecondWriter. If a session of a run ends with changes that were not committed, without an
    error or a rollback(), the log of the run names its line.
    """
    async with application_database().session(readonly) as session:
        yield session
        if not readonly and run_log.get() is not None and has_changes(session.sync_session):
            logger.warning(
                f"the session that {session_place.get() or caller()} has opened ended with changes "
                "that were not committed, so they are lost: call `commit()` before the end of its "
                "block, or `rollback()` if they are not wanted"
            )


def application_database() -> Database:
    """The application's database on this event loop. Outside a service it keeps no connection
    between uses.
    """
    from batch_system.settings.reading import get_settings

    loop = asyncio.get_running_loop()
    if services := _services.get(loop):
        return next(reversed(services))
    origin = _origin.get() or _Origin(get_settings().DATABASE_URL, None)
    opened_from, database = _opened.get(loop, (None, None))
    if database is None or opened_from != origin:
        database = Database(
            origin.url,
            setting="DATABASE_URL",
            pooled=False,
            shows_values=get_settings().BATCH_SHOW_SQL_PARAMETERS,
            pooler=get_settings().BATCH_DATABASE_POOLER,
        )
        track(database.engine.sync_engine)
        if origin.prepare is not None:
            origin.prepare(database)
        _opened[loop] = origin, database
    return database


def use_application_database(database: Database, prepare: Prepare | None = None) -> None:
    """Make `get_db()` on this event loop use a service's database, until
    `leave_application_database`.

    `prepare` is called with this database, and with each one that is opened in a context after
    `bind_to_service`.
    """
    loop = asyncio.get_running_loop()
    track(database.engine.sync_engine)
    if prepare is not None:
        prepare(database)
    origin = _Origin(database.url.render_as_string(hide_password=False), prepare)
    _services.setdefault(loop, {})[database] = origin


def leave_application_database(database: Database) -> None:
    """End the effect of `use_application_database` for this database. Other services on this loop
    keep theirs.
    """
    del _services[asyncio.get_running_loop()][database]


def bind_to_service() -> None:
    """Make this context open the application's database as the service of this loop does, wherever
    no service runs: on event loops of other threads, and on this one after the end of the service.
    """
    if services := _services.get(asyncio.get_running_loop()):
        _origin.set(next(reversed(services.values())))
