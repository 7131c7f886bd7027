"""Back up the application's database; delete old backups only after a new one is complete."""

from __future__ import annotations

from service import BaseTask, TaskRegistry, get_logger, get_settings
from service.backup import create_backup
from service.backup.retention import delete_expired

logger = get_logger(__name__)


class BackupTask(BaseTask):
    name = "backup"
    description = "Create a backup of the database"

    @property
    def schedule(self) -> str:
        return get_settings().BACKUP_CRON

    async def run(self) -> None:
        settings = get_settings()
        path = await create_backup(settings.BACKUP_DIR)
        logger.info(f"Backup created: {path}")
        async for old in delete_expired(settings.BACKUP_DIR, settings.BACKUP_RETENTION_DAYS):
            logger.info(f"Deleted old backup: {old}")


TaskRegistry.register(BackupTask)
