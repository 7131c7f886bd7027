"""Tries a restore in a scratch place: proves that the rows of a backup load, and changes
nothing.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from sqlalchemy.engine import URL, make_url

from batch_system.backup.file.format import SQLITE, WORDS
from batch_system.backup.file.progress import BackupMeter, BackupProgress
from batch_system.backup.file.reader import Backup, Source
from batch_system.backup.restoring import restore_sqlite, scratch_postgresql
from batch_system.backup.restoring.count import RestoreReport
from batch_system.concurrency.stoppable import Stop, in_thread
from batch_system.database.migrate import History
from batch_system.errors import BackupError


async def restore_into_scratch(
    source: Source,
    url: str,
    *,
    drill_url: str | None = None,
    on_progress: Callable[[BackupProgress], None] | None = None,
    folder: Path | None = None,
    histories: Sequence[History] = (),
) -> RestoreReport:
    """Load every row of a backup into new tables, compare the counts with the manifest, and remove
    the tables.

    On SQLite the tables are made in a new file in `folder` (by default the folder for temporary
    files), as in the application's file or by `histories`. On PostgreSQL they are made in a new
    schema in the database of `drill_url`, otherwise of `url`, in a transaction that is rolled back,
    so that even a kill leaves nothing behind. There `histories` make the tables, and tables of no
    history are made like those of the same name. `on_progress` is called on this event loop. Raises
    BackupError, even if only one table can't be tried out.
    """
    application, drill, loop = (
        make_url(url),
        make_url(drill_url) if drill_url else None,
        asyncio.get_running_loop(),
    )

    def tell(progress: BackupProgress) -> None:
        if on_progress:
            loop.call_soon_threadsafe(on_progress, progress)

    def work(stop: Stop) -> RestoreReport:
        backup = Backup.open(source)
        if backup.header.kind == SQLITE:
            place = folder or Path(tempfile.gettempdir())
            return restore_sqlite.try_out(
                backup, application, BackupMeter(tell), stop, folder=place, histories=histories
            )
        refuse_unfit(backup, application, drill)
        return scratch_postgresql.run(
            backup, drill or application, BackupMeter(tell), stop, histories
        )

    return await in_thread(work)


def refuse_unfit(backup: Backup, application: URL, drill: URL | None) -> None:
    """Raises BackupError if a backup of PostgreSQL can't be tried out in the database that the
    settings name.
    """
    kind = (drill or application).get_backend_name()
    if kind != backup.header.kind:
        raise BackupError(
            f"the backup {backup.source.name} is of PostgreSQL, and can't be tried out on "
            f"{WORDS.get(kind, kind)}: set RESTORE_DRILL_URL to an empty PostgreSQL database"
        )
    if drill is not None and address(drill) == address(application):
        raise BackupError(
            "RESTORE_DRILL_URL is the application's own database: name another database, or leave "
            "the setting empty to use a scratch schema in the application's database"
        )


def address(url: URL) -> tuple[object, ...]:
    """Where a PostgreSQL database is: its host, its port and its name."""
    return url.host or url.query.get("host"), url.port or 5432, url.database
