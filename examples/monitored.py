"""Report the duration, the progress and the result of the work.

The ledger records when each run began and ended, so a task has to measure only parts of a run. Use
`time.monotonic()` for durations, since the wall clock can be set back during the work.
"""

import asyncio
import time

from batch_system import BaseTask, TaskRegistry, current_run, get_logger

logger = get_logger(__name__)


class MonitoredTask(BaseTask):
    """Report the duration, the progress and the result of a run."""

    name = "monitored_task"
    description = "Report the duration, the progress and the result of a run"
    schedule = "0 10 * * *"

    async def run(self, steps: int = 5, pause: float = 0.02) -> dict[str, float]:
        began = time.monotonic()
        try:
            for done in range(steps):
                await self._execute(pause)
                current_run().progress(done + 1, steps)
        finally:  # also if the work fails
            elapsed = time.monotonic() - began
            logger.info(f"Task {self.name} ended after {elapsed:.2f} s")
        return {"steps": steps, "seconds": elapsed}

    async def _execute(self, pause: float) -> None:
        await asyncio.sleep(pause)


TaskRegistry.register(MonitoredTask)
