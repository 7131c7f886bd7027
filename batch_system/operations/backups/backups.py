"""Makes, checks, compares, copies, prunes and restores backups of the application's database."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.backup.comparing.compare import diff
from batch_system.backup.comparing.differences import Difference
from batch_system.backup.file.reader import SavedTable
from batch_system.backup.restoring.count import RestoreReport
from batch_system.backup.restoring.plan import RestorePlan
from batch_system.batch.ledger import database_time
from batch_system.batch.ledger.people import audit
from batch_system.operations.asking.context import Context
from batch_system.operations.backups import (
    catalogue,
    copies,
    delete,
    details,
    make,
    pins,
    restore,
)
from batch_system.operations.backups.access import BackupAccess
from batch_system.operations.backups.delete import DeletedBackup, PrunedBackup
from batch_system.operations.backups.details import BackupDetails
from batch_system.operations.backups.make import BackupResult
from batch_system.operations.backups.pins import PinChange
from batch_system.operations.backups.progress import OnProgress, ignore_progress
from batch_system.operations.backups.restore import RestoreRequest, RestoreResult
from batch_system.operations.backups.results import BackupSummary

MOST_NAMED = 20
"""How many deleted backups an event names."""

Warn = Callable[[str], None]
"""Called with a sentence about something that could not be read or done, while the rest of the work
is done.
"""


def ignore(_: str) -> None:
    """For callers that need no message."""


class Backups:
    """Operations on backups. A backup is given by a path, a name, `latest`, or
    s3://bucket/prefix/name.

    Each method raises BackupError, of which UnknownBackup, DamagedBackup and PlaceUnreachable are
    subclasses, and DatabaseError if it needs a database that can't be used. `on_progress` may be
    called by any thread.
    """

    def __init__(self, context: Context) -> None:
        self._access = BackupAccess(context.settings, context.databases)
        self._context = context

    async def create(self, on_progress: OnProgress = ignore_progress) -> BackupResult:
        """Make a backup in BACKUP_DIR, and verify it."""
        return await make.create(self._access, on_progress)

    async def list(self, warn: Warn) -> Sequence[BackupSummary]:
        """The backups in BACKUP_DIR and at BACKUP_URL, the newest first."""
        return await catalogue.list_backups(self._access, warn)

    async def rescan(self) -> int:
        """Read every backup, and rewrite their records in the ledger. Returns the number of
        backups.
        """
        return await catalogue.rescan(self._access)

    async def show(self, backup: str, warn: Warn) -> tuple[BackupDetails, Sequence[SavedTable]]:
        """What the manifest of a backup and the ledger say about it, and its tables."""
        return await details.describe_backup(self._access, backup, warn)

    async def verify(self, backup: str, on_progress: OnProgress = ignore_progress) -> BackupResult:
        """Compare every byte of a backup with its checksums, and record the outcome."""
        result = await make.check(self._access, backup, on_progress)
        await self._record("backup.verify", result.facts.name)
        return result

    async def verify_by_restoring(
        self, backup: str, on_progress: OnProgress = ignore_progress
    ) -> RestoreReport:
        """Restore a backup into a scratch place, compare the counts of rows, and record the
        outcome.
        """
        return await restore.check_by_restoring(self._access, backup, on_progress)

    async def diff(self, before: str, after: str | None = None) -> Difference:
        """Compare a backup with a later one, or with the database as it is now. Nothing is
        changed.
        """
        return await diff(self._access.settings, before, after)

    async def upload(
        self, backup: str, on_progress: OnProgress = ignore_progress, *, is_checked: bool = False
    ) -> BackupResult:
        """Copy a backup from BACKUP_DIR to BACKUP_URL. It is verified first, unless
        `is_checked`.
        """
        return await copies.upload(self._access, backup, on_progress, is_checked=is_checked)

    async def waiting(self) -> Sequence[str]:
        """The names of verified backups that still have to be uploaded to BACKUP_URL, the newest
        first.
        """
        return await copies.waiting(self._access)

    async def download(
        self, backup: str, on_progress: OnProgress = ignore_progress
    ) -> BackupResult:
        """Copy a backup from BACKUP_URL, or from the URL that is given, into BACKUP_DIR, and verify
        it.
        """
        return await copies.download(self._access, backup, on_progress)

    async def prune(
        self,
        warn: Warn,
        on_delete: Warn = ignore,
        *,
        dry_run: bool = False,
        allow_many: bool = False,
    ) -> Sequence[PrunedBackup]:
        """Delete old backups in each place, and return for each backup whether it was deleted, and
        why.

        `on_delete` is called with the path or URL of each deleted backup. `allow_many`: delete also
        more than half of the backups of a place, which is otherwise refused.
        """
        pruned = await delete.prune(
            self._access, warn, on_delete, dry_run=dry_run, allow_many=allow_many
        )
        if deleted := [each.backup for each in pruned if each.then == "deleted"]:
            await self._record(
                "backup.prune", None, {"number": len(deleted), "deleted": deleted[:MOST_NAMED]}
            )
        return pruned

    async def pin(self, backup: str) -> PinChange:
        """Keep a backup until it is unpinned."""
        change = await pins.pin(self._access, backup, self._context.actor.name)
        await self._record("backup.pin", backup)
        return change

    async def unpin(self, backup: str) -> PinChange:
        """Allow pruning to delete a backup again."""
        change = await pins.unpin(self._access, backup)
        await self._record("backup.unpin", backup)
        return change

    async def to_download(self, name: str) -> Path:
        """The file of the backup of this name in BACKUP_DIR. Raises UnknownBackup if it is not
        there.
        """
        file = await copies.local_file(self._access, name)
        await self._record("backup.download", name)
        return file

    async def find_to_delete(self, name: str) -> DeletedBackup:
        """What `delete` would delete. Nothing is changed. Raises as `delete`."""
        return await delete.find(self._access, name)

    async def delete(self, name: str) -> DeletedBackup:
        """Delete the backup of this name in each place. Raises BackupError if it is pinned."""
        deleted = await delete.delete(self._access, name)
        await self._record("backup.delete", name, {"places": deleted.places})
        return deleted

    async def plan_restore(self, request: RestoreRequest) -> RestorePlan:
        """Plan what `restore` would do. Nothing is changed. Raises BackupError if the restore would
        be refused.
        """
        return await restore.plan_if_possible(self._access, request)

    async def restore(
        self, request: RestoreRequest, on_progress: OnProgress = ignore_progress
    ) -> RestoreResult:
        """Restore the application's database from a backup, in one transaction, after backing up
        what it replaces.
        """
        result = await restore.restore(self._access, request, on_progress)
        if not request.dry_run:
            into = {"into": result.report.where} if request.into is not None else None
            await self._record("backup.restore", request.backup, into)
        return result

    async def _record(self, action: str, backup: str | None, after: Any = None) -> None:
        """Add an event to the audit. Only the name of a backup is recorded: its address may have a
        secret.
        """
        name = Path(backup).name if backup is not None else None

        async def write(connection: AsyncConnection) -> None:
            now = await database_time.now_of(connection)
            await audit.record(
                connection, self._context.actor.by, action, now, target=name, after=after
            )

        await self._access.record_if_possible(name or "backups", write)
