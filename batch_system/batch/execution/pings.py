"""Dead man's switches of tasks: calls an address when a run begins and ends, by a function that the
service sets.
"""

from __future__ import annotations

from collections.abc import Callable

from batch_system.batch.execution.ending import Ending
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.states import Origin, RunState
from batch_system.batch.tasks.partitions import Stage, stage_of
from batch_system.batch.tasks.registry import Task

_tell: Callable[[str], None] | None = None


def use(tell: Callable[[str], None] | None) -> None:
    """Call `tell` with each address, on the event loop. With None, no address is called."""
    global _tell
    _tell = tell


def began(task: Task, claimed: Claimed) -> None:
    """A run begins. Later attempts, parts and joins are not reported."""
    is_first = claimed.attempt == 1 and stage_of(task.partition, claimed) in (None, Stage.SPLIT)
    if _tell is not None and task.monitoring.ping is not None and is_first:
        _tell(f"{task.monitoring.ping.rstrip('/')}/start")


def ended(task: Task, claimed: Claimed, ending: Ending) -> None:
    """An attempt has ended. Only the end of a whole run is reported, not that of a part."""
    if claimed.origin != Origin.PART:
        run_ended(task, ending.state)


def run_ended(task: Task, state: RunState) -> None:
    """Report a run that has succeeded or failed. Other states are ignored."""
    if _tell is None or task.monitoring.ping is None:
        return
    if state == RunState.SUCCEEDED:
        _tell(task.monitoring.ping)
    elif state == RunState.FAILED:
        _tell(f"{task.monitoring.ping.rstrip('/')}/fail")
