"""restore(): a backup's rows in place of those of the application's database, in one transaction."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from sqlalchemy.engine import URL, make_url

from service.backup.file.progress import BackupMeter, BackupProgress
from service.backup.file.reader import Backup, Source
from service.backup.postgresql.server import LastCheck
from service.backup.restoring import plan as plans
from service.backup.restoring import restore_postgresql, restore_sqlite
from service.backup.restoring.count import Report
from service.backup.restoring.plan import Plan
from service.concurrency.stoppable import Stop, in_thread
from service.database.migrate import History
from service.errors import BackupError

KINDS: dict[str, ModuleType] = {"sqlite+aiosqlite": restore_sqlite, "postgresql+asyncpg": restore_postgresql}


async def planned(source: Source, url: str, *, histories: Sequence[History] = ()) -> Plan:
    """What `restore` would do to the database, and what is in the way. Nothing is changed. Raises BackupError."""
    target = make_url(url)

    def work(stop: Stop) -> Plan:
        backup, kind = _opened(source, target)
        if kind is restore_sqlite:
            return restore_sqlite.plan(backup, target, stop, histories=histories)
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
) -> Report:
    """Restore a backup into this database; `dry_run`: do it, and roll it back.

    `histories` are the migrations that make the tables which the database lacks, at the backup's revision. SQLite:
    `folder` has room for twice the data (that of temporary files otherwise).

    `last_check` is awaited once nobody else can write to the tables any more, on another event loop, and prevents the
    restore by raising. Raises BackupError, which says why; then, when cancelled and when the process is killed,
    everything in the database is as it was. (A cancel that comes while it commits may find it done.) `on_progress` is
    called on this event loop, where no work is done.
    """
    target, loop = make_url(url), asyncio.get_running_loop()

    def tell(progress: BackupProgress) -> None:
        if on_progress:
            loop.call_soon_threadsafe(on_progress, progress)

    def work(stop: Stop) -> Report:
        backup, kind = _opened(source, target)
        meter = BackupMeter(tell)
        if kind is restore_sqlite:
            return restore_sqlite.run(
                *(backup, target, meter, stop),
                dry_run=dry_run,
                last_check=last_check,
                folder=folder or Path(tempfile.gettempdir()),
                histories=histories,
            )
        return restore_postgresql.run(backup, target, meter, stop, histories, dry_run=dry_run, last_check=last_check)

    return await in_thread(work)


def _opened(source: Source, target: URL) -> tuple[Backup, ModuleType]:
    if target.drivername not in KINDS:
        raise BackupError(f"can't restore into {target.drivername}: it must be one of {', '.join(KINDS)}")
    backup = Backup.open(source)
    plans.refuse_other_kind(backup, target)
    return backup, KINDS[target.drivername]
