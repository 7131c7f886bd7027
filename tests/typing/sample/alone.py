"""The service that is started without the lifespan."""

import asyncio
from typing import assert_type

import batch_system
from batch_system import (
    BaseTask,
    BatchError,
    TaskRegistry,
    create_scheduler,
    start_scheduler,
    stop_scheduler,
)


class TickTask(batch_system.BaseTask):
    name = "tick"
    schedule = "* * * * * *"

    async def run(self) -> None:
        batch_system.get_logger(__name__).info("tick")


async def main() -> None:
    TaskRegistry.register(TickTask)
    assert_type(TaskRegistry.get_all_tasks(), list[type[BaseTask]])
    scheduler = create_scheduler()
    try:
        await start_scheduler(scheduler)
    except BatchError as error:
        print(assert_type(error.message, str))
    await stop_scheduler(scheduler)


if __name__ == "__main__":
    asyncio.run(main())
