"""Deleting old backups, in the folder and elsewhere, by one set of rules.

Each is deleted by itself, and the ledger hears of it afterwards: a kill in the midst leaves nothing half.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from service import clock
from service.backup.folder import taken_at
from service.backup.retention import Decision, Kept, Rules, decide
from service.backup.storage import Places, Storage, backups
from service.backup.threads import in_thread
from service.batch import records
from service.batch.records import Row
from service.config import Settings
from service.errors import DamagedBackup
from service.keeping import facts_of, known, recorded

MOST_READ = 5
"""So many of the newest files are read for their rows, where the ledger does not know them."""


@dataclass(frozen=True)
class Plan:
    """What is to become of the backups in one place."""

    storage: Storage
    is_local: bool
    decision: Decision


async def plans(settings: Settings) -> list[Plan]:
    """A plan for BACKUP_DIR, and one for BACKUP_URL. Raises BackupError, and DatabaseError where pins can't be read."""
    places = Places.of(settings)
    rows = await known(settings)
    elsewhere = await in_thread(lambda _: places.elsewhere())
    here = await _plan(places.folder, True, rows, settings)
    return [here, *([await _plan(elsewhere, False, rows, settings)] if elsewhere else [])]


async def _plan(storage: Storage, is_local: bool, rows: dict[str, Row], settings: Settings) -> Plan:
    kept = await in_thread(lambda _: _kept(storage, rows))
    return Plan(storage, is_local, decide(kept, rules(settings), clock.now()))


def rules(settings: Settings) -> Rules:
    return Rules(
        settings.BACKUP_RETENTION_DAYS,
        settings.BACKUP_KEEP_WEEKLY,
        settings.BACKUP_KEEP_MONTHLY,
        settings.BACKUP_LEAST_SHARE,
    )


def _kept(storage: Storage, rows: dict[str, Row]) -> list[Kept]:
    """The newest ones are read where the ledger does not know their rows, until two are there to be compared."""
    kept = []
    counted = read = 0
    for name, size in sorted(backups(storage.listed()).items(), reverse=True):
        one = of_row(name, trusted(rows.get(name), size))
        if one.rows is None and not one.failed and counted < 2 and read < MOST_READ:
            one = _read(storage, one)
            read += 1
        counted += one.rows is not None and not one.failed
        kept.append(one)
    return kept


def trusted(row: Row | None, size: int) -> Row | None:
    """What is known of a file that is as large as it was then. Of another one only whether the name is pinned."""
    if row is None or row["size"] == size:
        return row
    return {**records.UNKNOWN, "pinned_at": row["pinned_at"], "pinned_by": row["pinned_by"]}


def of_row(name: str, row: Row | None) -> Kept:
    at = taken_at(Path(name))
    assert at is not None
    if row is None:
        return Kept(name, at)
    is_verified, is_failed = row["verified_at"] is not None, row["failed_at"] is not None
    return Kept(name, at, row["rows"], is_verified, is_failed, row["pinned_at"] is not None)


def _read(storage: Storage, one: Kept) -> Kept:
    """With the rows that its manifest counts. One that can't be read has failed."""
    try:
        with storage.open(one.name) as source:
            rows = facts_of(source, one.name).rows
    except DamagedBackup:
        return replace(one, verified=False, failed=True)
    return replace(one, rows=rows)


async def prune(settings: Settings, planned: list[Plan]) -> AsyncIterator[str]:
    """Delete what the plans let go, and yield where each was that is gone. Who is pinned meanwhile stays."""
    for plan in planned:
        for name in plan.decision.going:
            row = await recorded(settings, partial(records.get, name=name))
            if row is not None and row["pinned_at"] is not None:
                continue
            await in_thread(lambda _, plan=plan, name=name: plan.storage.delete(name))  # type: ignore[misc]
            await recorded(settings, partial(records.gone, name=name, local=plan.is_local))
            yield f"{plan.storage.name}/{name}"
