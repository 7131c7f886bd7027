"""Backs up the application's database into a new file of a folder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from sqlalchemy.engine import make_url

from service import clock
from service.backup.file.folder import explained, remove_abandoned, reserve
from service.backup.file.format import POSTGRESQL, SQLITE
from service.backup.file.progress import BackupProgress
from service.backup.file.selection import Selection
from service.backup.making import process
from service.backup.making.request import BackupRequest
from service.concurrency.stoppable import Stop, in_thread
from service.config import Settings, get_settings
from service.database.urls import connect_arguments, safe_url
from service.errors import BackupError

KINDS = {"sqlite+aiosqlite": SQLITE, "postgresql+asyncpg": POSTGRESQL}

OnProgress = Callable[[BackupProgress], None] | None


async def create_backup(output_dir: Path, *, on_progress: OnProgress = None) -> Path:
    """Back up the application's database (DATABASE_URL) into `output_dir`, which is created if it
    is missing.

    Returns the path of the new file. Raises BackupError, whose message says what to do. After an
    error or a cancel no part of the new backup remains, and older backups are unchanged. The work
    is done in a process of its own, at a low priority. `on_progress` is called on the event loop.
    """
    request = _backup_request(get_settings())
    loop = asyncio.get_running_loop()

    def report(progress: BackupProgress) -> None:
        if on_progress:
            loop.call_soon_threadsafe(on_progress, progress)

    return await in_thread(lambda stop: _create(request, Path(output_dir), stop, report))


def create_backup_sync(output_dir: Path) -> Path:
    """Do what create_backup() does, for scripts without an event loop. Raises BackupError."""
    request = _backup_request(get_settings())
    return _create(request, Path(output_dir), Stop(), None)


def _backup_request(settings: Settings) -> BackupRequest:
    setting, database_url = settings.backup_database
    url = make_url(database_url)
    if url.drivername not in KINDS:
        raise BackupError(
            f"can't back up {url.drivername}: {setting} must be one of {', '.join(KINDS)}"
        )
    kind = KINDS[url.drivername]
    return BackupRequest(
        kind=kind,
        database=url.database or "",
        safe_url=safe_url(url),
        started=clock.now(),
        selection=Selection.of(
            settings.BACKUP_INCLUDE, settings.BACKUP_EXCLUDE, settings.BACKUP_LEDGER
        ),
        arguments=connect_arguments(url) if kind == POSTGRESQL else {},
        setting=setting,
    )


def _create(request: BackupRequest, folder: Path, stop: Stop, on_progress: OnProgress) -> Path:
    with explained(folder), reserve(folder, request.started) as reservation:
        remove_abandoned(folder, request.started)
        process.run_worker(request, reservation.partial, stop, on_progress)
        return reservation.publish()
