"""Which backups are too old, by the time in their names (a copied file has a new mtime), and deleting them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

from service import clock
from service.backup.folder import taken_at
from service.backup.threads import Stop, in_thread
from service.errors import BackupError


def expired(folder: Path, days: int, now: datetime) -> list[Path]:
    """The backups in `folder` older than `days`, oldest first. The newest of all is never one of them."""
    limit = now - timedelta(days=days)
    backups = sorted((at, path) for path in folder.glob("*") if (at := taken_at(path)))
    return [path for at, path in backups[:-1] if at < limit]


async def delete_expired(folder: Path, days: int) -> AsyncIterator[Path]:
    """Delete them one by one, and yield each one that is gone."""
    now = clock.now()
    for path in await in_thread(lambda _: expired(folder, days, now)):
        try:
            await in_thread(partial(_delete, path))
        except OSError as error:
            raise BackupError(f"the old backup {path} can't be deleted: {error.strerror}. Do it by hand.") from error
        yield path


def _delete(path: Path, _: Stop) -> None:
    path.unlink(missing_ok=True)
