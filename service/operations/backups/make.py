"""What BackupTask and `batch backup …` do with backups: make and check them, and record it in the ledger.

Everything works without a ledger too, on a machine where none is yet: then nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock
from service.backup.file.folder import taken_at
from service.backup.file.progress import BackupProgress
from service.backup.file.reader import Backup, LocalFile, Source
from service.backup.file.verify import verify
from service.backup.making.create import create_backup
from service.backup.places.place import FOLDER
from service.batch.context.current_run import current_run_if_any
from service.batch.ledger import backups
from service.batch.ledger.backups import CHECKSUMS, Facts
from service.concurrency.stoppable import Stop, in_thread
from service.errors import DamagedBackup, DatabaseError
from service.logs import get_logger
from service.operations.backups.access import BackupAccess
from service.operations.results import Result

T = TypeVar("T")
Tell = Callable[[int, int, str], None]
"""Is told bytes, of how many (0: not known), and what is going on. From any thread."""

logger = get_logger(__name__)

MEGABYTE = 1_000_000
CHANGED = "its manifest is not the one that the ledger has noted. Use another backup, and look at who can write there"


def nobody(done: int, total: int, what: str) -> None:
    """For who wants to hear nothing."""


def on_the_run() -> Tell:
    """Tells the current run, in megabytes. A task that is called by hand has none: then nobody."""
    run = current_run_if_any()

    def tell(done: int, total: int, what: str) -> None:
        if run:
            run.progress(done // MEGABYTE, max(total, done) // MEGABYTE or None, f"{what} (MB)")

    return tell


class BackupResult(Result):
    """What became of one backup: where it is now, and what its file says. `url`: where it was copied to."""

    path: str
    facts: Facts
    url: str | None = None


async def create(access: BackupAccess, tell: Tell = nobody) -> BackupResult:
    """Make a backup in BACKUP_DIR. It has its name only after it was read back, so it counts as verified."""

    def report(progress: BackupProgress) -> None:
        rows = f", {progress.rows:,} rows" if progress.rows else ""  # of SQLite's pages nobody counts them
        tell(progress.bytes, progress.estimate, progress.stage + rows)

    path = await create_backup(access.settings.BACKUP_DIR, on_progress=report)
    run = current_run_if_any()
    facts = await in_thread(lambda _: _facts(path))
    facts = replace(facts, taken_by_run=run.id if run else None)

    async def write(connection: AsyncConnection) -> None:
        await backups.record(connection, facts, FOLDER, clock.now(), is_new=True)
        await backups.verified(connection, facts.name, FOLDER, CHECKSUMS, clock.now())

    await access.noted(facts.name, write)
    return BackupResult(path=str(path), facts=facts)


async def check(access: BackupAccess, text: str, tell: Tell = nobody) -> BackupResult:
    """Read a backup and compare it with its checksums; a failure is recorded too. Raises BackupError."""
    source = await in_thread(lambda _: access.places.find(text))
    try:
        facts = await in_thread(lambda stop: _checked(source, stop, tell))
        place = access.place_of(source.name)
        if place is not None:
            await refuse_changed(access, source, facts)
    except DamagedBackup as error:
        await record_failure(access, source, error.message)
        raise
    finally:
        source.__exit__(None, None, None)
    if place is not None:
        await record_check(access, facts, place)
    return BackupResult(path=source.name, facts=facts)


async def refuse_changed(access: BackupAccess, source: Source, facts: Facts, hint: str = "") -> None:
    """Raises DamagedBackup where a backup of ours is not the one that we made, though all its checksums fit.

    They have no key: who can write the file can write them too, but not the ledger. `hint`: how to use it nevertheless.
    """
    try:
        made = await access.asked(partial(backups.manifests, name=facts.name))
    except DatabaseError as error:
        logger.warning(f"Whether {facts.name} is as it was made is not known: {error.message}")
        return
    if made and facts.manifest not in made:
        raise DamagedBackup(f"the backup {source.name} was changed since it was made: {CHANGED}{hint}")


async def record_check(access: BackupAccess, facts: Facts, place: str) -> None:
    """Every byte of the file in this place is as its checksums say."""

    async def write(connection: AsyncConnection) -> None:
        await backups.record(connection, facts, place, clock.now())
        await backups.verified(connection, facts.name, place, CHECKSUMS, clock.now())

    await access.noted(facts.name, write)


async def record_failure(access: BackupAccess, source: Source, why: str) -> None:
    """A backup of ours is not good. Of somebody else's file nothing is recorded."""
    place, path = access.place_of(source.name), Path(source.name)
    at = taken_at(path)
    if place is None or at is None:
        return

    async def write(connection: AsyncConnection) -> None:
        await backups.record(connection, Facts(path.name, at, size=source.size), place, clock.now())
        await backups.failed(connection, path.name, place, why, clock.now())

    await access.noted(path.name, write)


def _facts(path: Path) -> Facts:
    with LocalFile(path) as source:
        return facts_of(source, path.name)


def _checked(source: Source, stop: Stop, tell: Tell) -> Facts:
    done = 0

    def see(member: Any) -> None:
        nonlocal done
        done += member.packed
        tell(done, source.size, "verifying")

    verify(source, stop, see)
    return facts_of(source, Path(source.name).name)


def facts_of(source: Source, name: str) -> Facts:
    """What a backup's manifest says. Raises BackupError."""
    backup = Backup.open(source)
    header = backup.header
    rows = sum(one.rows for one in backup.tables)
    at = taken_at(Path(name)) or header.taken_at
    return Facts(
        name,
        at,
        header.kind,
        header.database,
        header.revision,
        source.size,
        rows,
        len(backup.tables),
        manifest=backup.manifest_sha256,
    )
