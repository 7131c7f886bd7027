"""Makes and verifies backups, and records the outcome in the ledger if there is one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.backup.file.folder import taken_at
from batch_system.backup.file.progress import BackupProgress
from batch_system.backup.file.reader import Backup, LocalFile, Source
from batch_system.backup.file.verify import verify
from batch_system.backup.making.create import create_backup
from batch_system.backup.places.place import FOLDER
from batch_system.batch.context.current_run import current_run_if_any
from batch_system.batch.ledger import backups
from batch_system.batch.ledger.backups import CHECKSUMS, Facts
from batch_system.concurrency.stoppable import Stop, in_thread
from batch_system.errors import DamagedBackup, DatabaseError
from batch_system.logs import get_logger
from batch_system.operations.asking.results import Result
from batch_system.operations.backups.access import BackupAccess
from batch_system.operations.backups.progress import OnProgress, ignore_progress

T = TypeVar("T")

logger = get_logger(__name__)

CHANGED = (
    "its manifest is not the one that the ledger has recorded. Use another backup, and look at "
    "who can write there"
)


class BackupResult(Result):
    """A backup that was made, checked or copied. `facts`: from its manifest. `url`: of its copy, if
    it was uploaded.
    """

    path: str
    facts: Facts
    url: str | None = None


async def create(access: BackupAccess, on_progress: OnProgress = ignore_progress) -> BackupResult:
    """Make a backup in BACKUP_DIR, and record it as verified, because it was read back. Raises
    BackupError.
    """

    def report(progress: BackupProgress) -> None:
        # SQLite's rows are not counted.
        rows = f", {progress.rows:,} rows" if progress.rows else ""
        on_progress(progress.bytes, progress.estimate, progress.stage + rows)

    path = await create_backup(access.settings.BACKUP_DIR, on_progress=report)
    run = current_run_if_any()
    facts = await in_thread(lambda _: _facts_of_file(path))
    facts = replace(facts, taken_by_run=run.id if run else None)

    async def write(connection: AsyncConnection) -> None:
        await backups.record(connection, facts, FOLDER, clock.now(), is_new=True)
        await backups.mark_verified(connection, facts.name, FOLDER, CHECKSUMS, clock.now())

    await access.record_if_possible(facts.name, write)
    return BackupResult(path=str(path), facts=facts)


async def check(
    access: BackupAccess, text: str, on_progress: OnProgress = ignore_progress
) -> BackupResult:
    """Compare a backup with its checksums, and record the outcome, also a failure. Raises
    BackupError.
    """
    source = await in_thread(lambda _: access.places.find(text))
    try:
        facts = await in_thread(lambda stop: _verified_facts(source, stop, on_progress))
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


async def refuse_changed(
    access: BackupAccess, source: Source, facts: Facts, hint: str = ""
) -> None:
    """Raises DamagedBackup if the manifest of a backup is not the one that the ledger recorded when
    it was made.

    The checksums in a backup have no secret key, so anybody who can write the file can replace
    them, but not the record in the ledger. `hint`: how to use the backup nevertheless; it ends the
    message.
    """
    try:
        recorded = await access.read_ledger(partial(backups.manifests, name=facts.name))
    except DatabaseError as error:
        logger.warning(
            f"Whether {facts.name} was changed since it was made could not be checked: "
            f"{error.message}"
        )
        return
    if recorded and facts.manifest not in recorded:
        raise DamagedBackup(
            f"the backup {source.name} was changed since it was made: {CHANGED}{hint}"
        )


async def record_check(access: BackupAccess, facts: Facts, place: str) -> None:
    """Record that every byte of the backup in this place is as its checksums say."""

    async def write(connection: AsyncConnection) -> None:
        await backups.record(connection, facts, place, clock.now())
        await backups.mark_verified(connection, facts.name, place, CHECKSUMS, clock.now())

    await access.record_if_possible(facts.name, write)


async def record_failure(access: BackupAccess, source: Source, why: str) -> None:
    """Record why the check of a backup failed. Nothing is recorded about a file outside BACKUP_DIR
    and BACKUP_URL.
    """
    place, path = access.place_of(source.name), Path(source.name)
    at = taken_at(path)
    if place is None or at is None:
        return

    async def write(connection: AsyncConnection) -> None:
        await backups.record(connection, Facts(path.name, at, size=source.size), place, clock.now())
        await backups.mark_failed(connection, path.name, place, why, clock.now())

    await access.record_if_possible(path.name, write)


def _facts_of_file(path: Path) -> Facts:
    with LocalFile(path) as source:
        return facts_of(source, path.name)


def _verified_facts(source: Source, stop: Stop, on_progress: OnProgress) -> Facts:
    done = 0

    def count(member: Any) -> None:
        nonlocal done
        done += member.packed
        on_progress(done, source.size, "verifying")

    verify(source, stop, count)
    return facts_of(source, Path(source.name).name)


def facts_of(source: Source, name: str) -> Facts:
    """The facts in the manifest of a backup. Raises BackupError."""
    backup = Backup.open(source)
    header = backup.header
    rows = sum(table.rows for table in backup.tables)
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
