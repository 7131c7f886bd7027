"""Backups of the application's database: lists, shows, verifies, compares and pins them. No path
and no address of a place is answered.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from pydantic import Field

from batch_system.operations.backups.results import (
    MOST_TABLES,
    BackupList,
    Difference,
    Pin,
    ShownBackup,
    TableDifference,
    TableOfBackup,
    VerifiedBackup,
)
from batch_system.verbs.fields import BackupName
from batch_system.verbs.verb import Verb, get, post

if TYPE_CHECKING:
    from batch_system.operations.asking.context import Context


class ListBackups(Verb, role="viewer", http=get("/backups")):
    """List the backups of the application's database."""

    async def perform(self, context: Context) -> BackupList:
        from batch_system.operations.backups.named import NamedBackups

        warnings: list[str] = []
        backups = await NamedBackups(context).list(
            lambda _: warnings.append("a place, or the ledger, could not be read")
        )
        return BackupList(backups=list(backups), warnings=warnings)


class ShowBackup(Verb, role="viewer", http=get("/backups/{name}")):
    """Show a backup and its tables."""

    name: BackupName

    async def perform(self, context: Context) -> ShownBackup:
        from batch_system.operations.backups.named import NamedBackups

        warnings: list[str] = []
        details, tables = await NamedBackups(context).show(
            self.name, lambda _: warnings.append("the ledger could not be read")
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


class VerifyBackup(
    Verb, role="operator", http=post("/backups/{name}/verify"), audit="backup.verify"
):
    """Compare every byte of a backup with its checksums, and record the outcome. It takes as long
    as reading it.
    """

    name: BackupName

    async def perform(self, context: Context) -> VerifiedBackup:
        from batch_system.operations.backups.named import NamedBackups

        facts = (await NamedBackups(context).verify(self.name)).facts
        return VerifiedBackup(backup=facts.name, rows=facts.rows, tables=facts.tables)


class DiffBackup(Verb, role="operator", http=get("/backups/{name}/diff")):
    """Compare a backup with a later one, or with the database as it is now. It takes as long as
    reading both.
    """

    name: BackupName
    after: BackupName | None = Field(
        None, description="The later backup. Default: the database as it is now."
    )

    async def perform(self, context: Context) -> Difference:
        from batch_system.operations.backups.named import NamedBackups

        difference = await NamedBackups(context).diff(self.name, self.after)
        return Difference(
            before=difference.before.name,
            after=difference.after.name,
            tables=[
                TableDifference.of(asdict(table), schema_changes=table.schema)
                for table in difference.tables
            ],
        )


class PinBackup(Verb, role="admin", http=post("/backups/{name}/pin"), audit="backup.pin"):
    """Keep a backup until it is unpinned."""

    name: BackupName

    async def perform(self, context: Context) -> Pin:
        from batch_system.operations.backups.named import NamedBackups

        await NamedBackups(context).pin(self.name)
        return Pin(backup=self.name, is_pinned=True)


class UnpinBackup(Verb, role="admin", http=post("/backups/{name}/unpin"), audit="backup.unpin"):
    """Allow pruning to delete a backup again."""

    name: BackupName

    async def perform(self, context: Context) -> Pin:
        from batch_system.operations.backups.named import NamedBackups

        await NamedBackups(context).unpin(self.name)
        return Pin(backup=self.name, is_pinned=False)
