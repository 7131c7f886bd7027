"""Restores the latest backup into a scratch place, counts the rows, and removes them again."""

from __future__ import annotations

from batch_system.batch.tasks.base import BaseTask
from batch_system.logs import get_logger
from batch_system.operations.backups.backups import Backups
from batch_system.operations.backups.progress import report_to_run
from batch_system.operations.here import operations_here
from batch_system.settings.reading import get_settings

logger = get_logger(__name__)


class RestoreDrillTask(BaseTask):
    """Prove that the latest backup can be restored. Without RESTORE_DRILL_CRON it only runs when it
    is started.

    Raises BackupError if the backup is damaged or can't be tried out.
    """

    name = "restore_drill"
    description = "Restore the latest backup into a scratch database, and compare the counts"

    @property
    def schedule(self) -> str | None:
        return get_settings().RESTORE_DRILL_CRON

    async def run(self) -> dict[str, int | str]:
        async with operations_here(get_settings()) as operations:
            backups = Backups(operations.context)
            report = await backups.verify_by_restoring("latest", report_to_run())
        for note in report.notes:
            logger.warning(note)
        logger.info(
            f"{report.backup} restored into {report.where}: {report.rows:,} rows of "
            f"{len(report.tables)} tables"
        )
        return {"backup": report.backup, "tables": len(report.tables), "rows": report.rows}
