"""Lists the backups in BACKUP_DIR and at BACKUP_URL, with what the ledger knows of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from threading import Lock

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.backup.file.folder import taken_at
from batch_system.backup.file.reader import LocalFile, Source, first_header
from batch_system.backup.file.source import Fetched
from batch_system.backup.places import pins
from batch_system.backup.places.pins import Listing
from batch_system.backup.places.place import FOLDER, Storage
from batch_system.backup.places.retention import Candidate, Decision, Rules, Verdict, decide
from batch_system.batch.ledger import backups
from batch_system.batch.ledger.backups import Facts, Row
from batch_system.concurrency.stoppable import in_thread
from batch_system.errors import BackupError, DamagedBackup, DatabaseError
from batch_system.operations.backups.access import BackupAccess
from batch_system.operations.backups.make import CHANGED, facts_of
from batch_system.operations.backups.results import BackupSummary

BackupKey = tuple[str, str]
"""A place and a name."""
READERS = 8
CHECKS = {"restored": "restored", "checksums": "checksums only"}


async def list_backups(access: BackupAccess, warn: Callable[[str], None]) -> list[BackupSummary]:
    """List the backups of each place, the newest first. Nothing is changed.

    `warn` is called if the ledger or BACKUP_URL can't be read; the other backups are listed then.
    The headers of local backups that the ledger does not know are read, but they have no count of
    rows. Raises BackupError.
    """
    places = access.places
    listings = [await in_thread(lambda _: pins.look(places.folder))]
    try:
        rows = await access.records()
    except DatabaseError as error:
        warn(f"what the ledger knows of backups is not shown: {error.message}")
        rows = {}
    try:
        if (elsewhere := await in_thread(lambda _: places.elsewhere())) is not None:
            listings.append(await in_thread(lambda _: pins.look(elsewhere)))
    except BackupError as error:
        warn(f"what is elsewhere is shown as the ledger knows it: {error.message}")
        listings.append(_recorded_listing(rows, places.url or ""))
    headers = await in_thread(
        lambda _: _read_all(places.folder, _unknown(listings[0], rows), _header_facts)
    )
    return _summaries(
        access, listings, rows | {(FOLDER, name): row for name, row in headers.items()}
    )


def _recorded_listing(rows: dict[BackupKey, Row], url: str) -> Listing:
    """The backups at a URL as the ledger knows them."""
    return Listing(
        url,
        {name: row["size"] or 0 for (place, name), row in rows.items() if place == url},
        frozenset(),
    )


def _unknown(listing: Listing, rows: dict[BackupKey, Row]) -> dict[str, int]:
    """The sizes of backups that the ledger does not know, or knows as files of another size, by
    name.
    """
    known = {
        name: rows.get((listing.place, name), backups.UNKNOWN)["size"] for name in listing.sizes
    }
    return {name: size for name, size in listing.sizes.items() if known[name] != size}


async def record_unknown(
    access: BackupAccess, storages: Sequence[Storage], listings: Sequence[Listing]
) -> dict[BackupKey, Row]:
    """Read the manifests of backups that the ledger does not know, and record them. Returns the
    rows of all backups.

    Without a ledger the rows are only from the manifests. A backup that can't be read is not
    recorded, because it may be sound. Raises BackupError and DatabaseError.
    """
    rows, started = await access.records(), clock.now()
    unknown: dict[BackupKey, Row] = {}
    for storage, listing in zip(storages, listings, strict=True):
        read = await in_thread(partial(_manifest_rows, storage, _unknown(listing, rows)))
        unknown |= {(listing.place, name): row for name, row in read.items()}
    is_recorded = (
        await access.in_ledger(lambda connection: _record(connection, unknown, started))
        if unknown
        else None
    )
    if is_recorded:
        unread = {key: row for key, row in unknown.items() if _is_unread(row)}
        return await access.records() | unread
    return rows | unknown


def _manifest_rows(storage: Storage, sizes: dict[str, int], _: object) -> dict[str, Row]:
    return _read_all(storage, sizes, facts_of)


async def _record(connection: AsyncConnection, rows: dict[BackupKey, Row], at: datetime) -> bool:
    """Record backups that were read, and which of them are damaged or changed."""
    for (place, name), row in rows.items():
        if _is_unread(row):
            continue
        await backups.record(
            connection, Facts(**{key: row[key] for key in backups.FACTS}), place, at
        )
        manifests = await backups.manifests(connection, name)
        if row["failed_at"]:
            await backups.mark_failed(connection, name, place, row["failed_check"], at)
        elif manifests and row["manifest"] not in manifests:
            await backups.mark_failed(
                connection, name, place, f"it was changed since it was made: {CHANGED}", at
            )
    return True


def _is_unread(row: Row) -> bool:
    """Whether the backup could not be read, for a reason that says nothing about the backup."""
    return row["failed_check"] is not None and row["failed_at"] is None


def _read_all(
    storage: Storage, sizes: dict[str, int], read: Callable[[Source, str], Facts]
) -> dict[str, Row]:
    """Read several backups at a time, but parse one manifest at a time, because that may take much
    memory.
    """
    parsing = Lock()
    with ThreadPoolExecutor(READERS) as readers:
        rows = readers.map(partial(_read, storage, read, parsing), sizes, sizes.values())
        return dict(zip(sizes, rows, strict=True))


def _read(
    storage: Storage, read: Callable[[Source, str], Facts], parsing: Lock, name: str, size: int
) -> Row:
    at = taken_at(Path(name))
    assert at is not None
    try:
        with storage.open(name) as source:
            fetched = source if isinstance(source, LocalFile) else Fetched(source)
            with parsing:
                return {**backups.UNKNOWN, **asdict(read(fetched, name))}
    except BackupError as error:  # a backup that can't be read now may be sound
        failed_at = clock.now() if isinstance(error, DamagedBackup) else None
        facts = {"name": name, "taken_at": at, "size": size}
        return {**backups.UNKNOWN, **facts, "failed_at": failed_at, "failed_check": error.message}


def _header_facts(source: Source, name: str) -> Facts:
    """The facts in the header of a backup. Raises DamagedBackup."""
    header = first_header(source)
    if header is None:
        raise DamagedBackup(f"{source.name} is not a backup of this service")
    at = taken_at(Path(name)) or header.taken_at
    return Facts(name, at, header.kind, header.database, header.revision, source.size)


def _pinned(listings: Sequence[Listing]) -> frozenset[str]:
    """The names of all backups that are pinned in one of the places."""
    return frozenset().union(*(listing.pinned for listing in listings))


def decide_all(
    access: BackupAccess, listings: Sequence[Listing], rows: dict[BackupKey, Row]
) -> list[Decision]:
    """Decide for each place which backups are kept."""
    pinned = _pinned(listings)
    rules = Rules(
        days=access.settings.BACKUP_RETENTION_DAYS,
        last=access.settings.BACKUP_KEEP_LAST,
        weekly=access.settings.BACKUP_KEEP_WEEKLY,
        monthly=access.settings.BACKUP_KEEP_MONTHLY,
        least_share=access.settings.BACKUP_LEAST_SHARE,
    )
    return [
        decide(
            (_candidate(name, rows.get((place, name)), name in pinned) for name in sizes),
            rules,
            clock.now(),
        )
        for place, sizes in ((listing.place, listing.sizes) for listing in listings)
    ]


def _candidate(name: str, row: Row | None, is_pinned: bool) -> Candidate:
    at, row = taken_at(Path(name)), row or backups.UNKNOWN
    assert at is not None
    checked = row["verified_at"] is not None, row["failed_at"] is not None
    return Candidate(name, at, row["rows"], *checked, pinned=is_pinned, unread=_is_unread(row))


def _summaries(
    access: BackupAccess, listings: Sequence[Listing], rows: dict[BackupKey, Row]
) -> list[BackupSummary]:
    summaries, pinned = [], _pinned(listings)
    for listing, decision in zip(listings, decide_all(access, listings, rows), strict=True):
        for verdict in decision.verdicts:
            size = listing.sizes[verdict.name]
            row = rows.get((listing.place, verdict.name), backups.UNKNOWN)
            row = row if row["size"] == size else backups.UNKNOWN
            summaries.append(
                BackupSummary.of(_fields(listing, verdict, row), pinned=verdict.name in pinned)
            )
    return sorted(summaries, key=lambda summary: summary.name, reverse=True)


def _fields(listing: Listing, verdict: Verdict, row: Row) -> Row:
    state = "not readable" if _is_unread(row) else backups.state(row)
    return {
        **row,
        "name": verdict.name,
        "place": listing.place,
        "taken_at": taken_at(Path(verdict.name)),
        "size": listing.sizes[verdict.name],
        "check": CHECKS.get(state, state),
        "kept": verdict.why,
        "where": "folder" if listing.place == FOLDER else "elsewhere",
    }


async def rescan(access: BackupAccess) -> int:
    """Read the manifests of all backups in both places, and rewrite their records. Returns the
    number of backups.

    Existing records keep what is known of a backup, unless the file has changed. Records without a
    file are deleted. Raises BackupError if a place can't be read, before any record is deleted, and
    DatabaseError.
    """
    started = clock.now()
    storages = await in_thread(lambda _: access.places.all())
    listings = await in_thread(lambda _: [pins.look(storage) for storage in storages])
    rows: dict[BackupKey, Row] = {}
    for storage, listing in zip(storages, listings, strict=True):
        read = await in_thread(partial(_manifest_rows, storage, listing.sizes))
        rows |= {(listing.place, name): row for name, row in read.items()}

    async def write(connection: AsyncConnection) -> bool:
        await _record(connection, rows, started)
        for listing in listings:
            await backups.remove_others(connection, listing.place, list(listing.sizes), started)
        return True

    if await access.in_ledger(write) is None:
        raise BackupError(
            "there is no ledger yet in which a rescan could record backups: `batch serve` or "
            "`batch run` makes it"
        )
    return len(rows)
