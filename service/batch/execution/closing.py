"""Reports runs that were closed while they waited: to the metrics, the log and dead man's
switches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from service.batch.execution import pings
from service.batch.ledger.states import RunState
from service.batch.queue.waiting import Closed
from service.batch.tasks.registry import Task
from service.logs import get_logger
from service.metrics.process import ProcessMetrics

logger = get_logger("service.batch")


def tell(metrics: ProcessMetrics, tasks: Mapping[str, Task], closed: Sequence[Closed]) -> None:
    """Tell of runs that this node has closed, after that was committed. `tasks`: those that it has
    loaded.
    """
    for run in closed:
        metrics.count_run(run.task, run.state, run.origin)
        if run.state == RunState.FAILED:  # a warning: the errors of its parts were logged as errors
            logger.warning(f"{run.task} failed: {run.reason}", run=run.id)
        if (task := tasks.get(run.task)) is not None:
            pings.run_ended(task, run.state)
