"""Opens the two databases of the settings, for a service and for commands."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from sqlalchemy.engine import make_url

from service.batch.ledger.migration import LEDGER_HISTORY
from service.batch.nodes import living, process_lock
from service.config import Settings
from service.database.engine import Database
from service.database.histories import APPLICATION_HISTORIES
from service.database.migrate import migrate
from service.errors import InvalidSetting


async def open_databases(settings: Settings, client: str = "batch") -> tuple[Database, Database]:
    """The application's database and the ledger, reachable and migrated. Raises DatabaseError, InvalidSetting."""
    _refuse_memory(settings)
    _refuse_one_file(settings)
    shows, pool_size = settings.BATCH_SHOW_SQL_PARAMETERS, settings.DATABASE_POOL_SIZE
    application = Database(
        settings.DATABASE_URL, setting="DATABASE_URL", pool_size=pool_size, client=client, shows_values=shows
    )
    ledger = Database(settings.ledger_url, setting="LEDGER_URL", pool_size=5, client=client, shows_values=shows)
    async with AsyncExitStack() as stack:
        for database in (application, ledger):
            stack.push_async_callback(database.dispose)
            await database.check()
        await migrate_ledger(ledger, settings)  # first: it is refused while processes of an older version live
        await migrate(application, *APPLICATION_HISTORIES)
        stack.pop_all()
    return application, ledger


async def migrate_ledger(ledger: Database, settings: Settings) -> None:
    """Bring the ledger to the migrations of this code. Raises DatabaseError.

    That is a DatabaseInUse where a process lives that works with the older ledger.
    """
    folder = process_lock.folder_of(settings.ledger_url)
    refuse = partial(living.refuse_living, folder=folder, lease_seconds=settings.LEASE_SECONDS)
    await migrate(ledger, LEDGER_HISTORY, before=refuse)


def _refuse_memory(settings: Settings) -> None:
    for name, url in (("DATABASE_URL", settings.DATABASE_URL), ("LEDGER_URL", settings.ledger_url)):
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
            raise InvalidSetting(f"setting {name}: a database in memory is gone with its connection; give it a file")


def _refuse_one_file(settings: Settings) -> None:
    urls = [make_url(url) for url in (settings.DATABASE_URL, settings.ledger_url)]
    if all(url.get_backend_name() == "sqlite" for url in urls):
        files = {Path(url.database or "").resolve() for url in urls}
        if len(files) == 1:
            raise InvalidSetting(
                "setting LEDGER_URL: it is the same SQLite file as DATABASE_URL, whose one writer would stop the "
                "service whenever a task holds a session open; give the ledger a file of its own, or leave it empty"
            )
