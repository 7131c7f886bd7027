"""Backs up the application's database, copies the backup elsewhere, and only then deletes old backups."""

from __future__ import annotations

from service.batch.tasks.base import BaseTask
from service.config import get_settings
from service.logs import get_logger
from service.operations.backups.make import report_to_run
from service.operations.here import operations_here

logger = get_logger(__name__)


class BackupTask(BaseTask):
    """Make a backup by the settings BACKUP_…, at BACKUP_CRON. Raises BackupError, and then nothing old is deleted."""

    name = "backup"
    description = "Create a backup of the database"

    @property
    def schedule(self) -> str:
        return get_settings().BACKUP_CRON

    async def run(self) -> None:
        settings, tell = get_settings(), report_to_run()
        async with operations_here(settings) as operations:
            backups = operations.backups
            made = await backups.create(tell)
            logger.info(f"Backup created: {made.path}")
            if settings.BACKUP_URL:
                for name in dict.fromkeys([made.facts.name, *await backups.waiting()]):
                    copied = await backups.upload(name, tell, is_checked=name == made.facts.name)
                    logger.info(f"Backup uploaded: {copied.url}")
            await backups.prune(logger.warning, on_delete=lambda old: logger.info(f"Deleted old backup: {old}"))
