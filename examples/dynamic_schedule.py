"""A schedule that comes from a setting, so that it can change without a change of code.

    CUSTOM_TASK_CRON="0 7 * * *"

A service reads the property again every few seconds, and `.env` when it changes. `get_settings().CUSTOM_TASK_CRON`
alone works too; then the setting has to be there, or the file is reported as broken.
"""

from service import BaseTask, TaskRegistry, get_logger, get_settings

logger = get_logger(__name__)


class DynamicScheduleTask(BaseTask):
    """Run when CUSTOM_TASK_CRON says so."""

    name = "dynamic_schedule"
    description = "Run when CUSTOM_TASK_CRON says so; without it, at 07:00"

    @property
    def schedule(self) -> str:
        return getattr(get_settings(), "CUSTOM_TASK_CRON", "0 7 * * *")

    async def run(self) -> None:
        logger.info(f"Fired by {self.schedule}")


TaskRegistry.register(DynamicScheduleTask)
