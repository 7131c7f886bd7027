"""Which backups there are, in the folder and elsewhere, with what the ledger knows of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from service import clock
from service.backup.folder import taken_at
from service.backup.reader import Backup, LocalFile, SavedTable, Source, first_header
from service.backup.retention import decide
from service.backup.source import Fetched
from service.backup.storage import Places, Storage, backups, find
from service.backup.threads import in_thread
from service.batch import records
from service.batch.records import Facts, Row
from service.config import Settings
from service.discarding import of_row, rules
from service.errors import BackupError, DamagedBackup, DatabaseError
from service.keeping import facts_of, known, own_name, recorded

READERS = 8
CHECKS = {"restored": "restored", "checksums": "checksums only"}


async def listed(settings: Settings, warn: Callable[[str], None]) -> list[Row]:
    """All backups, the newest first. `warn` is told what could not be asked; the rest is listed all the same.

    Of files that the ledger does not know the first bytes are read, which don't tell the rows; of those elsewhere none.
    """
    places = Places.of(settings)
    here = backups(await in_thread(lambda _: places.folder.listed()))
    try:
        rows = await known(settings)
    except DatabaseError as error:
        warn(f"what the ledger knows of backups is not shown: {error.message}")
        rows = {}
    there = {name: row["size"] for name, row in rows.items() if row["uploaded_at"]}
    try:
        if (elsewhere := await in_thread(lambda _: places.elsewhere())) is not None:
            there = backups(await in_thread(lambda _: elsewhere.listed()))
    except BackupError as error:
        warn(f"what is elsewhere is shown as the ledger knows it: {error.message}")
    unknown = {name: size for name, size in here.items() if name not in rows or rows[name]["size"] != size}
    read = await in_thread(lambda _: _read_all(places.folder, unknown, _brief))
    for name, row in read.items():
        pin = rows.get(name, records.UNKNOWN)
        rows[name] = {**row, "pinned_at": pin["pinned_at"], "pinned_by": pin["pinned_by"]}
    return _rows(here, there, rows, settings)


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
                return {**records.UNKNOWN, **asdict(read(fetched, name))}
    except BackupError as error:  # what can't be read today may be sound
        failed_at = clock.now() if isinstance(error, DamagedBackup) else None
        facts = {"name": name, "taken_at": at, "size": size}
        return {**records.UNKNOWN, **facts, "failed_at": failed_at, "failed_check": error.message}


def _brief(source: Source, name: str) -> Facts:
    """What the header says."""
    header = first_header(source)
    if header is None:
        raise DamagedBackup(f"{source.name} is not a backup of this service")
    at = taken_at(Path(name)) or header.taken_at
    return Facts(name, at, header.kind, header.database, header.revision, source.size)


def _rows(here: dict[str, int], there: Mapping[str, int | None], rows: dict[str, Row], settings: Settings) -> list[Row]:
    """For people: `check`, `kept` and `where` are words."""
    names = sorted({*here, *there}, reverse=True)
    decision = decide([of_row(name, rows.get(name)) for name in names], rules(settings), clock.now())
    verdicts = {verdict.name: verdict for verdict in decision.verdicts}
    return [_row(name, here, there, rows.get(name), verdicts[name].why) for name in names]


def _row(name: str, here: dict[str, int], there: Mapping[str, int | None], row: Row | None, why: str) -> Row:
    known_of = row or {**records.UNKNOWN, "taken_at": taken_at(Path(name))}
    state = records.state(known_of)
    if known_of["failed_check"] and not known_of["failed_at"]:
        state = "not readable"
    where = [place for place, names in (("folder", here), ("elsewhere", there)) if name in names]
    return {
        **known_of,
        "name": name,
        "size": here.get(name, there.get(name)),
        "check": CHECKS.get(state, state),
        "kept": why,
        "where": ", ".join(where),
    }


async def rescan(settings: Settings) -> int:
    """Read every backup's manifest, in both places, and write the ledger's rows anew; returns how many there are.

    Rows that are there keep what was done (verified, pinned); those whose file is in no place go, but for pinned ones.
    Raises BackupError where a place can't be looked at, and before anything is dropped.
    """
    began = clock.now()
    places = Places.of(settings)
    elsewhere = await in_thread(lambda _: places.elsewhere())
    here = backups(await in_thread(lambda _: places.folder.listed()))
    there = backups(await in_thread(lambda _: elsewhere.listed())) if elsewhere else {}
    far = {name: size for name, size in there.items() if name not in here}
    found = await in_thread(lambda _: _read_all(places.folder, here, facts_of))
    if elsewhere:
        found |= await in_thread(lambda _: _read_all(elsewhere, far, facts_of))
    names = tuple(Facts.__dataclass_fields__)

    async def write(connection: Any) -> bool:
        for name, row in found.items():
            facts = Facts(**{key: row[key] for key in names})
            url = f"{settings.BACKUP_URL}/{name}" if name in there else None
            await records.record(connection, facts, began, local=name in here, url=url)
            if name not in here:
                await records.gone(connection, name, local=True)
            if elsewhere and name not in there:
                await records.gone(connection, name, local=False)
            if row["failed_at"]:
                await records.failed(connection, name, row["failed_check"], began)
        await records.keep_only(connection, list(found), began)
        return True

    if await recorded(settings, write) is None:
        raise BackupError("there is no ledger yet that a rescan could write: `batch serve` or `batch run` makes it")
    return len(found)


async def shown(settings: Settings, text: str, warn: Callable[[str], None]) -> tuple[Row, list[SavedTable]]:
    """All about one backup: what its manifest says, what the ledger knows, and its tables. Raises BackupError."""

    def work(_: object) -> tuple[str, Backup]:
        with find(text) as source:
            return source.name, Backup.open(source)

    source, backup = await in_thread(work)
    header, name = backup.header, own_name(settings, source)
    row: Row | None = None
    try:
        if name:
            row = await recorded(settings, partial(records.get, name=name))
    except DatabaseError as error:
        warn(f"what the ledger knows of it is not shown: {error.message}")
    row = row or records.UNKNOWN
    state = records.state(row)
    about = {
        "backup": source,
        "taken": header.taken_at,
        "of": f"{header.database} ({header.kind} {header.server_version})",
        "migration": header.revision,
        "made by": header.tool,
        "run": row["taken_by_run"],
        "size": backup.source.size,
        "rows": sum(table.rows for table in backup.tables),
        "check": CHECKS.get(state, state),
        "checked": row["verified_at"] or row["failed_at"],
        "wrong": row["failed_check"],
        "uploaded": row["uploaded_at"],
        "to": row["url"],
        "restored": row["restored_at"],
        "pinned": row["pinned_at"],
        "pinned by": row["pinned_by"],
        "left out": list(backup.left_out),
    }
    return about, list(backup.tables)
