"""Say how long the work took, how far it is, and what came out.

The ledger knows when each run began and ended, so a task that wants no more needs none of this. Measure what a run has
inside. `time.monotonic()` is for that: the wall clock can be set back, and durations with it.
"""

import asyncio
import time

from service import BaseTask, TaskRegistry, current_run, get_logger

logger = get_logger(__name__)


class MonitoredTask(BaseTask):
    """Show the time, the progress and the result of a run."""

    name = "monitored_task"
    description = "Show the time, the progress and the result of a run"
    schedule = "0 10 * * *"

    async def run(self, steps: int = 5, pause: float = 0.02) -> dict[str, float]:
        began = time.monotonic()
        try:
            for done in range(steps):
                await self._execute(pause)
                current_run().progress(done + 1, steps)
        finally:  # also when it fails
            elapsed = time.monotonic() - began
            logger.info(f"Task {self.name} ended after {elapsed:.2f} s")
        return {"steps": steps, "seconds": elapsed}

    async def _execute(self, pause: float) -> None:
        await asyncio.sleep(pause)


TaskRegistry.register(MonitoredTask)
