"""The smallest useful task: a name, a schedule, and a run that logs."""

from batch_system import BaseTask, TaskRegistry, get_logger

logger = get_logger(__name__)


class MyCustomTask(BaseTask):
    """Show what a task looks like."""

    name = "my_custom_task"
    description = "Show what a task looks like"
    schedule = "30 3 * * *"  # every day at 03:30

    async def run(self) -> None:
        logger.info(f"Starting {self.name}")

        # Your work comes here: query a database, call an API, write a file.

        logger.info(f"Completed {self.name}")


TaskRegistry.register(MyCustomTask)  # optional: a class in the tasks folder registers itself
