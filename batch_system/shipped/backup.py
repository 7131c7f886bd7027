"""Backs up the application's database, copies the backup elsewhere, and only then deletes old
backups.
"""

from __future__ import annotations

from batch_system.batch.tasks.base import BaseTask
from batch_system.logs import get_logger
from batch_system.operations.backups.backups import Backups
from batch_system.operations.backups.progress import report_to_run
from batch_system.operations.here import operations_here
from batch_system.settings.reading import get_settings

logger = get_logger(__name__)


class BackupTask(BaseTask):
    """Make a backup by the settings BACKUP_…, at BACKUP_CRON. After a BackupError no old backup is
    deleted.
    """

    name = "backup"
    description = "Create a backup of the database"

    @property
    def schedule(self) -> str:
        return get_settings().BACKUP_CRON

    async def run(self) -> None:
        settings, on_progress = get_settings(), report_to_run()
        async with operations_here(settings) as operations:
            backups = Backups(operations.context)
            backup = await backups.create(on_progress)
            logger.info(f"Backup created: {backup.path}")
            if settings.BACKUP_URL:
                for name in dict.fromkeys([backup.facts.name, *await backups.waiting()]):
                    copy = await backups.upload(
                        name, on_progress, is_checked=name == backup.facts.name
                    )
                    logger.info(f"Backup uploaded: {copy.url}")
            await backups.prune(
                logger.warning, on_delete=lambda path: logger.info(f"Deleted old backup: {path}")
            )
