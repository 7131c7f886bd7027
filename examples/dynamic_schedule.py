"""A schedule that comes from a setting, so that it can be changed without changing code.

    CUSTOM_TASK_CRON="0 7 * * *"

A service reads the property again every few seconds, and `.env` when it changes. With
`get_settings().CUSTOM_TASK_CRON` instead of `getattr` the setting is required: without it, the file
is reported as broken.
"""

from batch_system import BaseTask, TaskRegistry, get_logger, get_settings

logger = get_logger(__name__)


class DynamicScheduleTask(BaseTask):
    """Run on the schedule in the setting CUSTOM_TASK_CRON."""

    name = "dynamic_schedule"
    description = "Run on the schedule in CUSTOM_TASK_CRON, by default at 07:00"

    @property
    def schedule(self) -> str:
        return getattr(get_settings(), "CUSTOM_TASK_CRON", "0 7 * * *")

    async def run(self) -> None:
        logger.info(f"Fired by {self.schedule}")


TaskRegistry.register(DynamicScheduleTask)
