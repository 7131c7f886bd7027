"""What is answered about backups. Only BackupSummary may have a path or the address of a
place, and only on this machine.
"""

from __future__ import annotations

from datetime import datetime

from batch_system.operations.asking.results import Result


class BackupSummary(Result):
    """A backup in a place. `place`: `folder`, or a URL. `size`: in bytes. Instants are in UTC.

    `check`, `kept` and `where` are texts for people. The other fields are from the ledger, and None
    if it does not know them.
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


MOST_TABLES = 10_000


class BackupList(Result):
    """The backups in both places, the newest first. `warnings`: what could not be read.

    `place` of a backup is `folder` or `elsewhere`.
    """

    backups: list[BackupSummary]
    warnings: list[str]


class TableOfBackup(Result):
    """A table in a backup. `bytes`: the size of its rows in the backup."""

    name: str
    rows: int
    bytes: int


class ShownBackup(Result):
    """What the manifest of a backup and the ledger say about it. `size` is in bytes."""

    backup: str
    taken_at: datetime
    database: str
    migration: str | None
    size: int
    rows: int
    check: str
    checked_at: datetime | None
    wrong: str | None
    restored_at: datetime | None
    is_pinned: bool
    left_out: list[str]
    tables: list[TableOfBackup]
    warnings: list[str]


class VerifiedBackup(Result):
    """A backup whose every byte fits its checksums."""

    backup: str
    rows: int | None
    tables: int | None


class TableDifference(Result):
    """How many rows of a table differ. `added`, `removed` and `changed`: None if no primary key
    identifies rows.
    """

    table: str
    rows_before: int | None
    rows_after: int | None
    added: int | None
    removed: int | None
    changed: int | None
    same: bool
    schema_changes: list[str]


class Difference(Result):
    """The differences from a backup to a later one, or to the database as it is now."""

    before: str
    after: str
    tables: list[TableDifference]


class Pin(Result):
    """A backup that is pinned or unpinned by now."""

    backup: str
    is_pinned: bool
