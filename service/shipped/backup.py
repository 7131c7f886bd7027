"""Backs up the application's database, copies the backup elsewhere, and only then deletes old backups."""

from __future__ import annotations

from service.batch.tasks.base import BaseTask
from service.config import get_settings
from service.logs import get_logger
from service.operations.backups.copies import upload, waiting
from service.operations.backups.make import create, on_the_run
from service.operations.backups.prune import plans, prune, warnings

logger = get_logger(__name__)


class BackupTask(BaseTask):
    """Make a backup by the settings BACKUP_…, at BACKUP_CRON. Raises BackupError, and then nothing old is deleted."""

    name = "backup"
    description = "Create a backup of the database"

    @property
    def schedule(self) -> str:
        return get_settings().BACKUP_CRON

    async def run(self) -> None:
        settings, tell = get_settings(), on_the_run()
        made = await create(settings, tell)
        logger.info(f"Backup created: {made.path}")
        if settings.BACKUP_URL:
            for name in dict.fromkeys([made.facts.name, *await waiting(settings)]):
                copied = await upload(settings, name, tell, is_checked=name == made.facts.name)
                logger.info(f"Backup uploaded: {copied.url}")
        planned = await plans(settings)
        for warning in warnings(planned):
            logger.warning(warning)
        async for old in prune(settings, planned):
            logger.info(f"Deleted old backup: {old}")
