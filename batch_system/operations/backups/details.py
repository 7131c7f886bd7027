"""Describes one backup: what its manifest and the ledger say about it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path

from pydantic import Field

from batch_system.backup.file.reader import Backup, SavedTable
from batch_system.backup.places import pins
from batch_system.backup.places.pins import Pin
from batch_system.batch.ledger import backups
from batch_system.batch.ledger.backups import Row
from batch_system.concurrency.stoppable import in_thread
from batch_system.errors import DatabaseError
from batch_system.operations.asking.results import Result
from batch_system.operations.backups.access import BackupAccess
from batch_system.operations.backups.catalogue import CHECKS


class BackupDetails(Result):
    """What the manifest of a backup and the ledger say about it. Instants are in UTC; `size` is in
    bytes.

    `pinned`: when the backup was pinned, or yes if that is not known. `wrong`: why its check
    failed.
    """

    backup: str
    taken: datetime
    of_database: str = Field(serialization_alias="of")
    migration: str | None
    made_by: str = Field(serialization_alias="made by")
    run: str | None
    size: int
    rows: int
    check: str
    checked: datetime | None
    wrong: str | None
    restored: datetime | None
    pinned: datetime | str | None
    pinned_by: str | None = Field(serialization_alias="pinned by")
    left_out: list[str] = Field(serialization_alias="left out")


async def describe_backup(
    access: BackupAccess, text: str, warn: Callable[[str], None]
) -> tuple[BackupDetails, list[SavedTable]]:
    """Describe a backup, and return its tables too. `warn` is called if the ledger can't be read.

    Raises BackupError.
    """

    def read(_: object) -> tuple[str, Backup]:
        with access.places.find(text) as source:
            return source.name, Backup.open(source)

    source, backup = await in_thread(read)
    header, name, place = backup.header, Path(source).name, access.place_of(source)
    row: Row | None = None
    pin: Pin | None = None
    try:
        if place is not None:
            pin = await in_thread(lambda _: _pin(access, place, name))
            row = await access.read_ledger(partial(backups.get, name=name, place=place))
    except DatabaseError as error:
        warn(f"what the ledger knows of the backup is not shown: {error.message}")
    row = row or backups.UNKNOWN
    state = backups.state(row)
    description = BackupDetails(
        backup=source,
        taken=header.taken_at,
        of_database=f"{header.database} ({header.kind} {header.server_version})",
        migration=header.revision,
        made_by=header.tool,
        run=row["taken_by_run"],
        size=backup.source.size,
        rows=sum(table.rows for table in backup.tables),
        check=CHECKS.get(state, state),
        checked=row["verified_at"] or row["failed_at"],
        wrong=row["failed_check"],
        restored=row["restored_at"],
        pinned=(pin.at or "yes") if pin else None,
        pinned_by=pin.by if pin else None,
        left_out=list(backup.left_out),
    )
    return description, list(backup.tables)


def _pin(access: BackupAccess, place: str, name: str) -> Pin | None:
    (storage,) = (storage for storage in access.places.all() if storage.place == place)
    return pins.read(storage, name) if pins.is_pinned(storage, name) else None
