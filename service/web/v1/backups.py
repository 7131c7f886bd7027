"""Backups: lists, shows, verifies, compares and pins them. No path and no address of a place is
answered.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Annotated

from fastapi import Query

from service.operations.asking.results import Result
from service.operations.backups.catalogue import BackupSummary
from service.operations.backups.make import BackupResult
from service.web.v1.requests import BACKUP, Admin, BackupName, Operator, Viewer, router

backups = router("backups")

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


@backups.get("/backups")
async def list_backups(operations: Viewer) -> BackupList:
    """The backups of the application's database."""
    warnings: list[str] = []
    summaries = await operations.named_backups.list(
        lambda _: warnings.append("a place, or the ledger, could not be read")
    )
    return BackupList(backups=list(summaries), warnings=warnings)


@backups.get("/backups/{name}")
async def show_backup(operations: Viewer, name: BackupName) -> ShownBackup:
    """A backup and its tables."""
    warnings: list[str] = []
    details, tables = await operations.named_backups.show(
        name, lambda _: warnings.append("the ledger could not be read")
    )
    return ShownBackup(
        backup=details.backup,
        taken_at=details.taken,
        database=details.of_database,
        migration=details.migration,
        size=details.size,
        rows=details.rows,
        check=details.check,
        checked_at=details.checked,
        wrong=details.wrong,
        restored_at=details.restored,
        is_pinned=details.pinned is not None,
        left_out=details.left_out,
        tables=[
            TableOfBackup(name=str(table), rows=table.rows, bytes=table.bytes)
            for table in tables[:MOST_TABLES]
        ],
        warnings=warnings,
    )


@backups.post("/backups/{name}/verify")
async def verify_backup(operations: Operator, name: BackupName) -> VerifiedBackup:
    """Compare every byte of a backup with its checksums, and record the outcome. It takes as long
    as reading it.
    """
    result: BackupResult = await operations.named_backups.verify(name)
    return VerifiedBackup(
        backup=result.facts.name, rows=result.facts.rows, tables=result.facts.tables
    )


@backups.get("/backups/{name}/diff")
async def diff_backup(
    operations: Operator,
    name: BackupName,
    after: Annotated[str | None, Query(pattern=BACKUP)] = None,
) -> Difference:
    """Compare a backup with a later one, or with the database as it is now. It takes as long as
    reading both.
    """
    difference = await operations.named_backups.diff(name, after)
    return Difference(
        before=difference.before.name,
        after=difference.after.name,
        tables=[
            TableDifference.of(asdict(table), schema_changes=table.schema)
            for table in difference.tables
        ],
    )


@backups.post("/backups/{name}/pin")
async def pin_backup(operations: Admin, name: BackupName) -> Pin:
    """Keep a backup until it is unpinned."""
    await operations.named_backups.pin(name)
    return Pin(backup=name, is_pinned=True)


@backups.post("/backups/{name}/unpin")
async def unpin_backup(operations: Admin, name: BackupName) -> Pin:
    """Allow pruning to delete a backup again."""
    await operations.named_backups.unpin(name)
    return Pin(backup=name, is_pinned=False)
