"""Which backups there are, in the folder and elsewhere, with what the ledger knows of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from threading import Lock

from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock
from service.backup.file.folder import taken_at
from service.backup.file.reader import LocalFile, Source, first_header
from service.backup.file.source import Fetched
from service.backup.places import pins
from service.backup.places.pins import Listing
from service.backup.places.place import FOLDER, Storage
from service.backup.places.retention import Candidate, Decision, Rules, Verdict, decide
from service.batch.ledger import backups
from service.batch.ledger.backups import Facts, Row
from service.concurrency.stoppable import in_thread
from service.errors import BackupError, DamagedBackup, DatabaseError
from service.operations.backups.access import BackupAccess
from service.operations.backups.make import CHANGED, facts_of
from service.operations.backups.pins import written_out
from service.operations.results import Result

Key = tuple[str, str]
"""A place and a name."""
READERS = 8
CHECKS = {"restored": "restored", "checksums": "checksums only"}


class BackupSummary(Result):
    """A backup in a place. `place`: `folder`, or a URL. `check`, `kept` and `where` are words for people.

    The rest is what the ledger knows; None: not known. Sizes are bytes.
    """

    name: str
    place: str
    taken_at: datetime
    size: int
    rows: int | None
    tables: int | None
    taken_by_run: str | None
    verified_at: datetime | None
    failed_at: datetime | None
    restored_at: datetime | None
    kind: str | None
    database: str | None
    revision: str | None
    verified_how: str | None
    failed_check: str | None
    manifest: str | None
    created_at: datetime | None
    check: str
    kept: str
    where: str
    pinned: bool


async def listed(access: BackupAccess, warn: Callable[[str], None]) -> list[BackupSummary]:
    """All backups of each place, the newest first. `warn` is told what could not be asked; the rest is listed all the
    same, and nothing is changed.

    Of files that the ledger does not know the first bytes are read, which don't tell the rows; of those elsewhere none.
    """
    places = access.places
    seen = [await in_thread(lambda _: pins.look(places.folder))]
    try:
        rows = await access.known()
    except DatabaseError as error:
        warn(f"what the ledger knows of backups is not shown: {error.message}")
        rows = {}
    try:
        if (elsewhere := await in_thread(lambda _: places.elsewhere())) is not None:
            seen.append(await in_thread(lambda _: pins.look(elsewhere)))
    except BackupError as error:
        warn(f"what is elsewhere is shown as the ledger knows it: {error.message}")
        seen.append(_remembered(rows, places.url or ""))
    read = await in_thread(lambda _: _read_all(places.folder, _unknown(seen[0], rows), _brief))
    return _rows(seen, rows | {(FOLDER, name): row for name, row in read.items()}, access)


def _remembered(rows: dict[Key, Row], url: str) -> Listing:
    return Listing(url, {name: row["size"] or 0 for (place, name), row in rows.items() if place == url}, frozenset())


def _unknown(seen: Listing, rows: dict[Key, Row]) -> dict[str, int]:
    """The backups of a place that the ledger does not know, or knows as files of another size."""
    return {n: size for n, size in seen.sizes.items() if rows.get((seen.place, n), backups.UNKNOWN)["size"] != size}


async def adopted(access: BackupAccess, storages: Sequence[Storage], seen: Sequence[Listing]) -> dict[Key, Row]:
    """What is known of the backups in these places, once the manifests of all that the ledger did not know are read.

    Without a ledger it is what they say. Of one that can't be read nothing is recorded: it may be sound.
    """
    rows, began = await access.known(), clock.now()
    found: dict[Key, Row] = {}
    for storage, one in zip(storages, seen, strict=True):
        read = await in_thread(partial(_all_facts, storage, _unknown(one, rows)))
        found |= {(one.place, name): row for name, row in read.items()}
    is_recorded = await access.recorded(lambda connection: _record(connection, found, began)) if found else None
    if is_recorded:
        unread = {key: row for key, row in found.items() if _is_unread(row)}
        return await access.known() | unread
    return rows | found


def _all_facts(storage: Storage, sizes: dict[str, int], _: object) -> dict[str, Row]:
    return _read_all(storage, sizes, facts_of)


async def _record(connection: AsyncConnection, found: dict[Key, Row], at: datetime) -> bool:
    for (place, name), row in found.items():
        if _is_unread(row):
            continue
        await backups.record(connection, Facts(**{key: row[key] for key in backups.FACTS}), place, at)
        made = await backups.manifests(connection, name)
        if row["failed_at"]:
            await backups.failed(connection, name, place, row["failed_check"], at)
        elif made and row["manifest"] not in made:
            await backups.failed(connection, name, place, f"it was changed since it was made: {CHANGED}", at)
    return True


def _is_unread(row: Row) -> bool:
    return row["failed_check"] is not None and row["failed_at"] is None


def _read_all(storage: Storage, sizes: dict[str, int], read: Callable[[Source, str], Facts]) -> dict[str, Row]:
    """Several are waited for at once, and one is parsed: a manifest may take much memory."""
    parsing = Lock()
    with ThreadPoolExecutor(READERS) as readers:
        rows = readers.map(partial(_read, storage, read, parsing), sizes, sizes.values())
        return dict(zip(sizes, rows, strict=True))


def _read(storage: Storage, read: Callable[[Source, str], Facts], parsing: Lock, name: str, size: int) -> Row:
    at = taken_at(Path(name))
    assert at is not None
    try:
        with storage.open(name) as source:
            fetched = source if isinstance(source, LocalFile) else Fetched(source)
            with parsing:
                return {**backups.UNKNOWN, **asdict(read(fetched, name))}
    except BackupError as error:  # what can't be read today may be sound
        failed_at = clock.now() if isinstance(error, DamagedBackup) else None
        facts = {"name": name, "taken_at": at, "size": size}
        return {**backups.UNKNOWN, **facts, "failed_at": failed_at, "failed_check": error.message}


def _brief(source: Source, name: str) -> Facts:
    """What the header says."""
    header = first_header(source)
    if header is None:
        raise DamagedBackup(f"{source.name} is not a backup of this service")
    at = taken_at(Path(name)) or header.taken_at
    return Facts(name, at, header.kind, header.database, header.revision, source.size)


def _pinned(seen: Sequence[Listing], rows: dict[Key, Row]) -> frozenset[str]:
    """What is pinned in one of the places, or by an older version in the ledger, is pinned in all of them."""
    return frozenset(row["name"] for row in rows.values() if row["pinned_at"]).union(*(one.pinned for one in seen))


def decided(seen: Sequence[Listing], rows: dict[Key, Row], access: BackupAccess) -> list[Decision]:
    """What is to become of the backups in each place."""
    pinned = _pinned(seen, rows)
    rules = Rules(
        days=access.settings.BACKUP_RETENTION_DAYS,
        last=access.settings.BACKUP_KEEP_LAST,
        weekly=access.settings.BACKUP_KEEP_WEEKLY,
        monthly=access.settings.BACKUP_KEEP_MONTHLY,
        least_share=access.settings.BACKUP_LEAST_SHARE,
    )
    return [
        decide((_kept(n, rows.get((one.place, n)), n in pinned) for n in one.sizes), rules, clock.now()) for one in seen
    ]


def _kept(name: str, row: Row | None, is_pinned: bool) -> Candidate:
    at, row = taken_at(Path(name)), row or backups.UNKNOWN
    assert at is not None
    checked = row["verified_at"] is not None, row["failed_at"] is not None
    return Candidate(name, at, row["rows"], *checked, pinned=is_pinned, unread=_is_unread(row))


def _rows(seen: list[Listing], rows: dict[Key, Row], access: BackupAccess) -> list[BackupSummary]:
    """For people: `check`, `kept` and `where` are words."""
    found, pinned = [], _pinned(seen, rows)
    for one, decision in zip(seen, decided(seen, rows, access), strict=True):
        for verdict in decision.verdicts:
            size = one.sizes[verdict.name]
            row = rows.get((one.place, verdict.name), backups.UNKNOWN)
            row = row if row["size"] == size else backups.UNKNOWN
            found.append(BackupSummary.of(_row(one, verdict, row), pinned=verdict.name in pinned))
    return sorted(found, key=lambda summary: summary.name, reverse=True)


def _row(seen: Listing, verdict: Verdict, row: Row) -> Row:
    state = "not readable" if _is_unread(row) else backups.state(row)
    return {
        **{key: value for key, value in row.items() if not key.startswith("pinned")},
        "name": verdict.name,
        "place": seen.place,
        "taken_at": taken_at(Path(verdict.name)),
        "size": seen.sizes[verdict.name],
        "check": CHECKS.get(state, state),
        "kept": verdict.why,
        "where": "folder" if seen.place == FOLDER else "elsewhere",
    }


async def rescan(access: BackupAccess) -> int:
    """Read every backup's manifest, in both places, and write the ledger's rows anew; returns how many there are.

    Rows that are there keep what was done, unless the file is another one; those whose file is gone go. Raises
    BackupError where a place can't be looked at, and before anything is dropped.
    """
    began = clock.now()
    storages = await in_thread(lambda _: access.places.all())
    seen = await in_thread(lambda _: [pins.look(storage) for storage in storages])
    await written_out(access, storages, seen)
    found: dict[Key, Row] = {}
    for storage, one in zip(storages, seen, strict=True):
        read = await in_thread(partial(_all_facts, storage, one.sizes))
        found |= {(one.place, name): row for name, row in read.items()}

    async def write(connection: AsyncConnection) -> bool:
        await _record(connection, found, began)
        for one in seen:
            await backups.keep_only(connection, one.place, list(one.sizes), began)
        return True

    if await access.recorded(write) is None:
        raise BackupError("there is no ledger yet that a rescan could write: `batch serve` or `batch run` makes it")
    return len(found)
