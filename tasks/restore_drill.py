"""Restores the latest backup where nobody sees it, counts the rows, and leaves nothing behind."""

from __future__ import annotations

from service import BaseTask, TaskRegistry, get_logger, get_settings
from service.operations.backups.make import on_the_run
from service.operations.here import operations_here

logger = get_logger(__name__)


class RestoreDrillTask(BaseTask):
    """Prove that the latest backup can be restored. Without RESTORE_DRILL_CRON it is only started by hand."""

    name = "restore_drill"
    description = "Restore the latest backup into a scratch database, and compare the counts"

    @property
    def schedule(self) -> str | None:
        return get_settings().RESTORE_DRILL_CRON

    async def run(self) -> dict[str, int | str]:
        async with operations_here(get_settings()) as operations:
            report = await operations.backups.verify_by_restoring("latest", on_the_run())
        for note in report.notes:
            logger.warning(note)
        logger.info(
            f"{report.backup} restored into {report.where}: {report.rows:,} rows of {len(report.tables)} tables"
        )
        return {"backup": report.backup, "tables": len(report.tables), "rows": report.rows}


TaskRegistry.register(RestoreDrillTask)
