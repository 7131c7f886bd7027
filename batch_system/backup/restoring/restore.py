"""Replaces the rows of a database by those of a backup, in one transaction."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from sqlalchemy.engine import URL, make_url

from batch_system.backup.file.progress import BackupMeter, BackupProgress
from batch_system.backup.file.reader import Backup, Source
from batch_system.backup.postgresql.server import LastCheck
from batch_system.backup.restoring import plan as plans
from batch_system.backup.restoring import restore_postgresql, restore_sqlite
from batch_system.backup.restoring.count import RestoreReport
from batch_system.backup.restoring.plan import RestorePlan
from batch_system.concurrency.stoppable import Stop, in_thread
from batch_system.database.migrate import History
from batch_system.errors import BackupError

KINDS: dict[str, ModuleType] = {
    "sqlite+aiosqlite": restore_sqlite,
    "postgresql+asyncpg": restore_postgresql,
}


async def planned(
    source: Source, url: str, *, histories: Sequence[History] = (), example: Path | None = None
) -> RestorePlan:
    """Plan what restore() would do to the database. Nothing is changed. Raises BackupError."""
    target = make_url(url)

    def work(stop: Stop) -> RestorePlan:
        backup, kind = _opened(source, target)
        if kind is restore_sqlite:
            return restore_sqlite.plan(backup, target, stop, histories=histories, example=example)
        return restore_postgresql.plan(backup, target, stop, histories)

    return await in_thread(work)


async def restore(
    source: Source,
    url: str,
    *,
    dry_run: bool = False,
    last_check: LastCheck | None = None,
    on_progress: Callable[[BackupProgress], None] | None = None,
    folder: Path | None = None,
    histories: Sequence[History] = (),
    example: Path | None = None,
) -> RestoreReport:
    """Restore a backup into the database of `url`.

    Args:
        dry_run: Roll everything back at the end.
        last_check: Awaited on another event loop when no other connection can write to the tables
            any more. It prevents the restore by raising BackupError.
        on_progress: Called on this event loop.
        folder: On SQLite, a folder with room for twice the data; None: that of temporary files.
        histories: The migrations that make the tables that the database lacks, at the backup's
            revision.
        example: On SQLite, the file whose tables an empty database gets, if it is at the backup's
            revision.

    Raises BackupError, whose message says why. After an error, a cancel or a kill the database is
    unchanged, except that a cancel during the commit may come too late. The work is done in a
    thread.
    """
    target, loop = make_url(url), asyncio.get_running_loop()

    def tell(progress: BackupProgress) -> None:
        if on_progress:
            loop.call_soon_threadsafe(on_progress, progress)

    def work(stop: Stop) -> RestoreReport:
        backup, kind = _opened(source, target)
        meter = BackupMeter(tell)
        if kind is restore_sqlite:
            return restore_sqlite.run(
                backup,
                target,
                meter,
                stop,
                dry_run=dry_run,
                last_check=last_check,
                folder=folder or Path(tempfile.gettempdir()),
                histories=histories,
                example=example,
            )
        return restore_postgresql.run(
            backup, target, meter, stop, histories, dry_run=dry_run, last_check=last_check
        )

    return await in_thread(work)


def _opened(source: Source, target: URL) -> tuple[Backup, ModuleType]:
    """The backup, and the module that restores its kind of database."""
    if target.drivername not in KINDS:
        raise BackupError(
            f"can't restore into {target.drivername}: the database's URL must begin with one of "
            f"{', '.join(KINDS)}"
        )
    backup = Backup.open(source)
    plans.refuse_other_kind(backup, target)
    return backup, KINDS[target.drivername]
