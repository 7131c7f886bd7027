"""`operations.backups`: makes, checks, compares, copies, keeps and restores backups of the application's database."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from service.backup.comparing.compare import diff
from service.backup.comparing.differences import Difference
from service.backup.file.reader import SavedTable
from service.backup.restoring.count import RestoreReport
from service.backup.restoring.plan import RestorePlan
from service.operations.backups import catalogue, copies, details, make, pins, prune, restore
from service.operations.backups.access import BackupAccess
from service.operations.backups.catalogue import BackupSummary
from service.operations.backups.details import BackupDetails
from service.operations.backups.make import BackupResult, Tell, nobody
from service.operations.backups.pins import PinChange
from service.operations.backups.prune import PrunedBackup
from service.operations.backups.restore import Restored, RestoreRequest

Warn = Callable[[str], None]
"""Is told, in a sentence, of something that could not be asked or done, while the rest is."""


def ignore(_: str) -> None:
    """For callers that want to hear nothing."""


class Backups:
    """What can be asked of backups. A backup is given by a path, a name, `latest`, or s3://bucket/prefix/name.

    Each method raises BackupError: UnknownBackup, DamagedBackup, or PlaceUnreachable where that is the reason; and
    DatabaseError where the ledger is needed and away. `tell` is told how far the work is, from any thread.
    """

    def __init__(self, access: BackupAccess, actor: str) -> None:
        self._access = access
        self._actor = actor

    async def create(self, tell: Tell = nobody) -> BackupResult:
        """Make a backup in BACKUP_DIR, and read it back."""
        return await make.create(self._access, tell)

    async def list(self, warn: Warn) -> Sequence[BackupSummary]:
        """The backups in BACKUP_DIR and at BACKUP_URL, the newest first."""
        return await catalogue.listed(self._access, warn)

    async def rescan(self) -> int:
        """Read every file, and write the ledger's rows of backups anew; returns how many there are."""
        return await catalogue.rescan(self._access)

    async def show(self, backup: str, warn: Warn) -> tuple[BackupDetails, Sequence[SavedTable]]:
        """What a backup holds and what is known of it, and its tables."""
        return await details.describe_backup(self._access, backup, warn)

    async def verify(self, backup: str, tell: Tell = nobody) -> BackupResult:
        """Read a backup and compare every byte with its checksums; what comes of it is recorded."""
        return await make.check(self._access, backup, tell)

    async def verify_by_restoring(self, backup: str, tell: Tell = nobody) -> RestoreReport:
        """Restore a backup where nobody sees it, and compare what is there; what comes of it is recorded."""
        return await restore.check_by_restoring(self._access, backup, tell)

    async def diff(self, before: str, after: str | None = None) -> Difference:
        """What differs between a backup and a later one, or the database as it is now. Changes nothing."""
        return await diff(self._access.settings, before, after)

    async def upload(self, backup: str, tell: Tell = nobody, *, is_checked: bool = False) -> BackupResult:
        """Copy a backup of BACKUP_DIR to BACKUP_URL; it is verified first, unless that was done just now."""
        return await copies.upload(self._access, backup, tell, is_checked=is_checked)

    async def waiting(self) -> Sequence[str]:
        """The names of verified backups that should be at BACKUP_URL and are not, the newest first."""
        return await copies.waiting(self._access)

    async def download(self, backup: str, tell: Tell = nobody) -> BackupResult:
        """Copy a backup from BACKUP_URL, or from its own address, into BACKUP_DIR, and verify it."""
        return await copies.download(self._access, backup, tell)

    async def prune(
        self, warn: Warn, on_delete: Warn = ignore, *, dry_run: bool = False, is_meant: bool = False
    ) -> Sequence[PrunedBackup]:
        """Delete old backups in each place, and say of each backup what became of it, and why.

        `on_delete` is told where each was, once it is gone.

        Where more than half of a place's backups would go, nothing goes unless it `is_meant`.
        """
        return await prune.prune(self._access, warn, on_delete, dry_run=dry_run, is_meant=is_meant)

    async def pin(self, backup: str) -> PinChange:
        """Keep a backup until it is unpinned, however old."""
        return await pins.pin(self._access, backup, self._actor)

    async def unpin(self, backup: str) -> PinChange:
        """Let a backup be deleted again when it is old."""
        return await pins.unpin(self._access, backup)

    async def plan_restore(self, request: RestoreRequest) -> RestorePlan:
        """What `restore` would do. Raises BackupError where something is in the way."""
        return await restore.plan_if_possible(self._access, request)

    async def restore(self, request: RestoreRequest, tell: Tell = nobody) -> Restored:
        """Restore the application's database from a backup, in one transaction, after a backup of what is there."""
        return await restore.restore(self._access, request, tell)
