"""restore_into_scratch(): proves that a backup's rows load, and changes nothing."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from sqlalchemy.engine import URL, make_url

from service import clock
from service.backup import scratch_postgresql
from service.backup.count import Report, compared
from service.backup.format import SQLITE, WORDS
from service.backup.plainfile import unpacked
from service.backup.progress import Meter, Progress
from service.backup.reader import Backup, Source
from service.backup.threads import Stop, in_thread
from service.database.migrate import History
from service.errors import BackupError


async def restore_into_scratch(
    source: Source,
    url: str,
    *,
    drill_url: str | None = None,
    histories: Sequence[History] = (),
    on_progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Load every row of a backup where nobody sees it, compare the counts with the manifest, and leave nothing there.

    SQLite: in a file beside the database, which SQLite checks as a whole. PostgreSQL: in tables made for it, in one
    transaction that is rolled back, so that not even `kill -9` leaves any; in the database of `drill_url`, or else in
    that of `url`. `histories` are the migrations that make them; what they don't make looks like the table of the same
    name that is there. Raises BackupError, also where a table of the backup could not be tried.
    """
    application, drill, loop = make_url(url), make_url(drill_url) if drill_url else None, asyncio.get_running_loop()

    def tell(progress: Progress) -> None:
        if on_progress:
            loop.call_soon_threadsafe(on_progress, progress)

    def work(stop: Stop) -> Report:
        backup = Backup.open(source)
        if backup.header.kind == SQLITE:
            return _into_a_file(backup, application, Meter(tell), stop)
        refuse_unfit(backup, application, drill)
        return scratch_postgresql.run(backup, drill or application, Meter(tell), stop, histories)

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


def _into_a_file(backup: Backup, application: URL, meter: Meter, stop: Stop) -> Report:
    started = clock.monotonic()
    beside = Path(application.database or "").parent
    is_there = application.get_backend_name() == "sqlite" and beside.is_dir()
    with unpacked(backup, beside if is_there else Path(tempfile.gettempdir()), meter, stop):
        rows = {str(table): table.rows for table in backup.tables}  # as the check of the file has counted
    counted = compared(backup.source.name, backup.tables, {}, rows)
    return Report(backup.source.name, "a temporary file", counted, clock.monotonic() - started, dry_run=True)
