"""What BackupTask and `batch backup …` do with backups: make, check and pin them, and record it in the ledger.

Everything works without a ledger too, on a machine where none is yet: then nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock
from service.backup.create import create_backup
from service.backup.folder import taken_at
from service.backup.progress import Progress
from service.backup.reader import Backup, LocalFile, Source
from service.backup.storage import find
from service.backup.threads import Stop, in_thread
from service.backup.verify import verify
from service.batch import records
from service.batch.context import current_run_if_any
from service.batch.records import CHECKSUMS, Facts, Row
from service.batch.tables import backups as table
from service.config import Settings
from service.database.engine import Database
from service.errors import BackupError, DamagedBackup, DatabaseError
from service.logs import get_logger

T = TypeVar("T")
Tell = Callable[[int, int, str], None]
"""Is told bytes, of how many (0: not known), and what is going on. From any thread."""

logger = get_logger(__name__)

MEGABYTE = 1_000_000


def nobody(done: int, total: int, what: str) -> None:
    """For who wants to hear nothing."""


def on_the_run() -> Tell:
    """Tells the current run, in megabytes. A task that is called by hand has none: then nobody."""
    run = current_run_if_any()

    def tell(done: int, total: int, what: str) -> None:
        if run:
            run.progress(done // MEGABYTE, max(total, done) // MEGABYTE or None, f"{what} (MB)")

    return tell


@dataclass(frozen=True)
class Done:
    """What became of one backup: where it is now, and what its file says."""

    path: str
    facts: Facts
    url: str | None = None


async def recorded(
    settings: Settings, write: Callable[[AsyncConnection], Awaitable[T]], *, reads: bool = False
) -> T | None:
    """One transaction in the ledger; None where there is none yet. Raises DatabaseError.

    `reads`: it only reads, and on SQLite does not wait for the write lock.
    """
    database = Database(settings.ledger_url, setting="LEDGER_URL", pooled=False)
    if _is_to_come(database):
        return None
    try:
        await database.check()
        async with database.reader.connect() as connection:
            tables = set(await connection.run_sync(lambda sync: inspect(sync).get_table_names()))
        if "batch_runs" not in tables:
            return None
        if table.name not in tables:
            from service.database.migrate import migrate
            from service.host import LEDGER_HISTORY  # which imports all of a service

            await migrate(database, LEDGER_HISTORY)
        async with (database.reader if reads else database.engine).begin() as connection:
            return await write(connection)
    except (DBAPIError, OSError) as error:
        raise database.unreachable(error) from error
    finally:
        await database.dispose()


async def noted(settings: Settings, name: str, write: Callable[[AsyncConnection], Awaitable[None]]) -> None:
    """As `recorded`; but where the ledger is away that is only told, for the work on the backup itself is done."""
    try:
        await recorded(settings, write)
    except DatabaseError as error:
        logger.warning(f"The ledger has not heard what was done with {name}: {error.message}")


def _is_to_come(database: Database) -> bool:
    return database.kind == "sqlite" and not Path(database.url.database or "").exists()


async def known(settings: Settings) -> dict[str, Row]:
    """What the ledger knows of backups, by name. Raises DatabaseError."""
    return {row["name"]: row for row in await recorded(settings, records.listed) or ()}


async def create(settings: Settings, tell: Tell = nobody) -> Done:
    """Make a backup in BACKUP_DIR. It has its name only after it was read back, so it counts as verified."""

    def report(progress: Progress) -> None:
        rows = f", {progress.rows:,} rows" if progress.rows else ""  # of SQLite's pages nobody counts them
        tell(progress.bytes, progress.estimate, progress.stage + rows)

    path = await create_backup(settings.BACKUP_DIR, on_progress=report)
    run = current_run_if_any()
    facts = await in_thread(lambda _: _facts(path))
    facts = replace(facts, taken_by_run=run.id if run else None)

    async def write(connection: AsyncConnection) -> None:
        await records.record(connection, facts, clock.now())
        await records.verified(connection, facts.name, CHECKSUMS, clock.now())

    await noted(settings, facts.name, write)
    return Done(str(path), facts)


async def check(settings: Settings, text: str, tell: Tell = nobody) -> Done:
    """Read a backup and compare it with its checksums; a failure is recorded too. Raises BackupError."""
    source = await in_thread(lambda _: find(text))
    try:
        facts = await in_thread(lambda stop: _checked(source, stop, tell))
    except DamagedBackup as error:
        await record_failure(settings, source, error.message)
        raise
    finally:
        source.__exit__(None, None, None)
    if own_name(settings, source.name):
        await noted(settings, facts.name, partial(_record_check, source=source, facts=facts))
    return Done(source.name, facts)


async def _record_check(connection: AsyncConnection, source: Source, facts: Facts) -> None:
    await _record(connection, source, facts)
    await records.verified(connection, facts.name, CHECKSUMS, clock.now())


async def record_failure(settings: Settings, source: Source, why: str) -> None:
    """A backup of ours is not good. Of somebody else's file nothing is recorded."""
    name = own_name(settings, source.name)
    at = taken_at(Path(name)) if name else None
    if name is None or at is None:
        return

    async def write(connection: AsyncConnection) -> None:
        await _record(connection, source, Facts(name, at, size=source.size))
        await records.failed(connection, name, why, clock.now())

    await noted(settings, name, write)


async def _record(connection: AsyncConnection, source: Source, facts: Facts) -> None:
    url = source.name if "://" in source.name else None
    await records.record(connection, facts, clock.now(), local=url is None, url=url)


def own_name(settings: Settings, source: str) -> str | None:
    """The name of a backup in one of our places: what the ledger may know. None: it is somebody else's file."""
    path = Path(source)
    if taken_at(path) is None:
        return None
    if "://" in source:
        return path.name if source == f"{settings.BACKUP_URL}/{path.name}" else None
    folders = [settings.BACKUP_DIR, *_folder_of(settings.BACKUP_URL)]
    return path.name if path.resolve().parent in [folder.resolve() for folder in folders] else None


def _folder_of(url: str | None) -> list[Path]:
    return [Path(url.removeprefix("file://"))] if url and url.startswith("file://") else []


async def pin(settings: Settings, text: str, by: str) -> tuple[str, bool]:
    """Keep a backup for ever; returns its name, and whether it was not pinned yet. Raises BackupError."""
    name, facts = await _named(settings, text)

    async def write(connection: AsyncConnection) -> bool:
        await records.record(connection, facts, clock.now(), local=False)
        return await records.pin(connection, name, by, clock.now())

    return name, await _in_ledger(settings, write)


async def unpin(settings: Settings, text: str) -> tuple[str, bool]:
    """Let a backup be pruned again; returns its name, and whether it was pinned. Raises BackupError.

    By its bare name also one that is damaged, or gone.
    """
    is_name = Path(text).name == text and taken_at(Path(text)) is not None
    name = text if is_name else (await _named(settings, text))[0]
    return name, await _in_ledger(settings, lambda connection: records.unpin(connection, name))


async def _named(settings: Settings, text: str) -> tuple[str, Facts]:
    def work(_: Stop) -> tuple[str, Facts]:
        with find(text) as source:
            return source.name, facts_of(source, Path(source.name).name)

    source, facts = await in_thread(work)
    if own_name(settings, source) is None:
        raise BackupError(f"{source} is neither in BACKUP_DIR nor at BACKUP_URL, where nothing else is ever pruned")
    return facts.name, facts


async def _in_ledger(settings: Settings, write: Callable[[AsyncConnection], Awaitable[bool]]) -> bool:
    done = await recorded(settings, write)
    if done is None:
        raise BackupError("pins are kept in the ledger, and there is none yet: `batch serve` or `batch run` makes it")
    return done


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
    return Facts(name, at, header.kind, header.database, header.revision, source.size, rows, len(backup.tables))
