"""What BackupTask and `batch backup …` do with backups: make and check them, and record it in the ledger.

Everything works without a ledger too, on a machine where none is yet: then nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock
from service.backup.file.folder import taken_at
from service.backup.file.progress import Progress
from service.backup.file.reader import Backup, LocalFile, Source
from service.backup.file.verify import verify
from service.backup.making.create import create_backup
from service.backup.places.place import FOLDER, find
from service.batch.context.current_run import current_run_if_any
from service.batch.ledger import backups
from service.batch.ledger.backups import CHECKSUMS, Facts, Row
from service.batch.ledger.tables import backups as table
from service.concurrency.stoppable import Stop, in_thread
from service.config import Settings
from service.database.engine import Database
from service.errors import DamagedBackup, DatabaseError
from service.logs import get_logger
from service.operations.databases import migrate_ledger
from service.placeurl import FILE, folder_of

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


@dataclass(frozen=True)
class Done:
    """What became of one backup: where it is now, and what its file says."""

    path: str
    facts: Facts
    url: str | None = None


async def recorded(
    settings: Settings,
    work: Callable[[AsyncConnection], Awaitable[T]],
    *,
    reads: bool = False,
    migrates: bool = True,
) -> T | None:
    """One transaction in the ledger; None where there is none yet. Raises DatabaseError.

    An older ledger is migrated before; with `migrates=False` it is an error, and nothing is changed. `reads`: it waits
    for no lock, and migrates nothing either.
    """
    database = Database(settings.ledger_url, setting="LEDGER_URL", pool_size=1)
    if _is_to_come(database):
        return None
    try:
        await database.check()
        async with database.reader.connect() as connection:
            if not await connection.run_sync(lambda sync: inspect(sync).has_table("batch_runs")):
                return None
            is_older = not await connection.run_sync(_has_places)
        if is_older and not migrates:
            raise DatabaseError("the ledger is at an older migration than this code; `batch serve` migrates it")
        if is_older and not reads:
            await migrate_ledger(database, settings)
        async with (database.reader if reads else database.engine).begin() as connection:
            return await work(connection)
    except (DBAPIError, OSError) as error:
        raise database.unreachable(error) from error
    finally:
        await database.dispose()


def _has_places(connection: Connection) -> bool:
    """Whether the ledger has its table of backups as this code knows it."""
    tables = inspect(connection)
    return tables.has_table(table.name) and "place" in {column["name"] for column in tables.get_columns(table.name)}


async def asked(settings: Settings, query: Callable[[AsyncConnection], Awaitable[T]]) -> T | None:
    """Reads what the ledger knows of backups; None where there is none yet. Raises DatabaseError, also where the
    ledger is older than this code, so that its table looks otherwise."""
    return await recorded(settings, query, reads=True, migrates=False)


async def noted(settings: Settings, name: str, write: Callable[[AsyncConnection], Awaitable[None]]) -> None:
    """As `recorded`; but where the ledger is away, or older than this code, that is only told: the work on the backup
    itself is done, and a restore may be about to bring back the ledger as it is."""
    try:
        await recorded(settings, write, migrates=False)
    except DatabaseError as error:
        logger.warning(f"The ledger has not heard what was done with {name}: {error.message}")


def _is_to_come(database: Database) -> bool:
    return database.kind == "sqlite" and not Path(database.url.database or "").exists()


async def known(settings: Settings) -> dict[tuple[str, str], Row]:
    """What the ledger knows of backups, by place and name. Raises DatabaseError."""
    return {(row["place"], row["name"]): row for row in await asked(settings, backups.listed) or ()}


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
        await backups.record(connection, facts, FOLDER, clock.now(), is_new=True)
        await backups.verified(connection, facts.name, FOLDER, CHECKSUMS, clock.now())

    await noted(settings, facts.name, write)
    return Done(str(path), facts)


async def check(settings: Settings, text: str, tell: Tell = nobody) -> Done:
    """Read a backup and compare it with its checksums; a failure is recorded too. Raises BackupError."""
    source = await in_thread(lambda _: find(text))
    try:
        facts = await in_thread(lambda stop: _checked(source, stop, tell))
        place = place_of(settings, source.name)
        if place is not None:
            await refuse_changed(settings, source, facts)
    except DamagedBackup as error:
        await record_failure(settings, source, error.message)
        raise
    finally:
        source.__exit__(None, None, None)
    if place is not None:
        await record_check(settings, facts, place)
    return Done(source.name, facts)


async def refuse_changed(settings: Settings, source: Source, facts: Facts, hint: str = "") -> None:
    """Raises DamagedBackup where a backup of ours is not the one that we made, though all its checksums fit.

    They have no key: who can write the file can write them too, but not the ledger. `hint`: how to use it nevertheless.
    """
    try:
        made = await asked(settings, partial(backups.manifests, name=facts.name))
    except DatabaseError as error:
        logger.warning(f"Whether {facts.name} is as it was made is not known: {error.message}")
        return
    if made and facts.manifest not in made:
        raise DamagedBackup(f"the backup {source.name} was changed since it was made: {CHANGED}{hint}")


async def record_check(settings: Settings, facts: Facts, place: str) -> None:
    """Every byte of the file in this place is as its checksums say."""

    async def write(connection: AsyncConnection) -> None:
        await backups.record(connection, facts, place, clock.now())
        await backups.verified(connection, facts.name, place, CHECKSUMS, clock.now())

    await noted(settings, facts.name, write)


async def record_failure(settings: Settings, source: Source, why: str) -> None:
    """A backup of ours is not good. Of somebody else's file nothing is recorded."""
    place, path = place_of(settings, source.name), Path(source.name)
    at = taken_at(path)
    if place is None or at is None:
        return

    async def write(connection: AsyncConnection) -> None:
        await backups.record(connection, Facts(path.name, at, size=source.size), place, clock.now())
        await backups.failed(connection, path.name, place, why, clock.now())

    await noted(settings, path.name, write)


def place_of(settings: Settings, source: str) -> str | None:
    """In which of our places a backup is, as the ledger calls it. None: it is somebody else's file."""
    path, url = Path(source), settings.BACKUP_URL
    if taken_at(path) is None:
        return None
    if "://" in source:
        return url if source == f"{url}/{path.name}" else None
    folder = path.resolve().parent
    if folder == settings.BACKUP_DIR.resolve():
        return FOLDER
    return url if url and url.startswith(FILE) and folder == folder_of(url).resolve() else None


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
