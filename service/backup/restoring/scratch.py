"""restore_into_scratch(): proves that a backup's rows load, and changes nothing."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from sqlalchemy.engine import URL, make_url

from service.backup.file.format import SQLITE, WORDS
from service.backup.file.progress import BackupMeter, BackupProgress
from service.backup.file.reader import Backup, Source
from service.backup.restoring import restore_sqlite, scratch_postgresql
from service.backup.restoring.count import Report
from service.concurrency.stoppable import Stop, in_thread
from service.database.migrate import History
from service.errors import BackupError


async def restore_into_scratch(
    source: Source,
    url: str,
    *,
    drill_url: str | None = None,
    on_progress: Callable[[BackupProgress], None] | None = None,
    folder: Path | None = None,
    histories: Sequence[History] = (),
) -> Report:
    """Load every row of a backup where nobody sees it, compare the counts with the manifest, and leave nothing there.

    SQLite: by the same restore into an empty file in `folder`; tables are made as in the application's file, or by
    `histories`. PostgreSQL: in a schema made for it, in one transaction that is rolled back, so that not even `kill -9`
    leaves any of it; in the database of `drill_url`, or else in that of `url`. There `histories` make the tables, and
    what they don't make is made like the table of its name. Raises BackupError, also where a table could not be tried.
    """
    application, drill, loop = make_url(url), make_url(drill_url) if drill_url else None, asyncio.get_running_loop()

    def tell(progress: BackupProgress) -> None:
        if on_progress:
            loop.call_soon_threadsafe(on_progress, progress)

    def work(stop: Stop) -> Report:
        backup = Backup.open(source)
        if backup.header.kind == SQLITE:
            place = folder or Path(tempfile.gettempdir())
            return restore_sqlite.try_out(
                backup, application, BackupMeter(tell), stop, folder=place, histories=histories
            )
        refuse_unfit(backup, application, drill)
        return scratch_postgresql.run(backup, drill or application, BackupMeter(tell), stop, histories)

    return await in_thread(work)


def refuse_unfit(backup: Backup, application: URL, drill: URL | None) -> None:
    kind = (drill or application).get_backend_name()
    if kind != backup.header.kind:
        raise BackupError(
            f"the backup {backup.source.name} is one of PostgreSQL, and can't be tried out on "
            f"{WORDS.get(kind, kind)}: set RESTORE_DRILL_URL to an empty PostgreSQL database"
        )
    if drill is not None and _place(drill) == _place(application):
        raise BackupError(
            "RESTORE_DRILL_URL is the application's own database: name another one, or leave it empty; "
            "then a scratch schema is used there"
        )


def _place(url: URL) -> tuple[object, ...]:
    return url.host or url.query.get("host"), url.port or 5432, url.database
