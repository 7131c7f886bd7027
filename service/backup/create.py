"""create_backup(): from the database to a file that has been read back."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from sqlalchemy.engine import URL, make_url

from service import clock
from service.backup import postgresql, sqlite
from service.backup.archive import Archive
from service.backup.folder import explained, remove_abandoned, reserve
from service.backup.threads import Stop, in_thread
from service.backup.verify import verify
from service.config import get_settings
from service.errors import BackupError

Writer = Callable[[URL, Archive, Stop], None]
WRITERS: dict[str, Writer] = {"sqlite+aiosqlite": sqlite.write, "postgresql+asyncpg": postgresql.write}


async def create_backup(output_dir: Path) -> Path:
    """Back up the application's database (DATABASE_URL) into `output_dir`, which is made if missing.

    Returns the new file. Raises BackupError, which says what to do; then, and when cancelled, nothing of the new
    backup stays and older ones are as they were. The work is done in threads of its own, never on the event loop.
    """
    url = make_url(get_settings().DATABASE_URL)
    if url.drivername not in WRITERS:
        raise BackupError(f"can't back up {url.drivername}: DATABASE_URL must be one of {', '.join(WRITERS)}")
    started = clock.now()
    return await in_thread(lambda stop: _create(url, Path(output_dir), started, stop))


def _create(url: URL, folder: Path, started: datetime, stop: Stop) -> Path:
    with explained(folder), reserve(folder, started) as place:
        remove_abandoned(folder, started)
        with Archive(place.partial, started) as archive:
            WRITERS[url.drivername](url, archive, stop)
        verify(place.partial, stop)
        return place.publish()
