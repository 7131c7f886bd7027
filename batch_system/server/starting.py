"""After the start of a process: prints a short summary, and makes garbage collections rarer."""

from __future__ import annotations

import gc
import heapq
from collections.abc import Collection, Iterator

from batch_system import console
from batch_system.batch.firing.apscheduler import next_run_times
from batch_system.batch.tasks.discovery import folder_of
from batch_system.server.service import BatchService

MOST_LISTED = 20
"""How many tasks the summary of a service lists: those that are due next."""
MOST_NAMED = 10
"""How many tasks the summary of a worker names."""


def collect_no_garbage_yet() -> None:
    """Collect no garbage before the start is over, because nearly all new objects stay.

    With 10,000 tasks the collections took almost a second.
    """
    gc.freeze()
    gc.set_threshold(100_000, 50, 1_000)


def collect_garbage_less_often() -> None:
    """Make full garbage collections rare: one during 10,000 runs would stop the event loop for a
    third of a second (measured).

    The collection of young objects stays frequent, because each statement of SQLAlchemy leaves
    cycles: about 1 MB a minute with 60 tasks each second, which would use memory until then.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def print_summary(batch: BatchService, where: str) -> None:
    """Print the kind of the process, and what it has loaded. `where`: " on " and its address, or
    nothing.
    """
    is_worker = batch.roles.is_worker
    lines = [
        f"Worker of {_named(batch.roles.pools)}{where}" if is_worker else f"Batch System{where}",
        f"  application  {batch.application.safe_url}",
        f"  ledger       {batch.ledger.safe_url}",
        *(_tasks_of_pools(batch) if is_worker else _tasks(batch)),
        *(f"  can't be used: {file.source}: {file.error}" for file in batch.broken),
    ]
    for line in lines:
        console.say(line, flush=True)


def _tasks(batch: BatchService) -> Iterator[str]:
    number = len(batch.tasks)
    if not number:
        yield f"  no tasks yet: drop a file into {folder_of(batch.settings.TASKS_DIR)}/"
        return
    yield f"  {number:,} task{'s' if number > 1 else ''}, times in UTC:"
    times = next_run_times(batch.scheduler)
    shown = heapq.nsmallest(
        MOST_LISTED, batch.tasks, key=lambda n: (times.get(n) is None, times.get(n), n)
    )
    width = max(map(len, shown))
    for name in shown:
        at = times.get(name)
        when = (
            f"next {at:%Y-%m-%d %H:%M:%S}"
            if at
            else "paused"
            if batch.tasks[name].schedule
            else "by hand"
        )
        yield f"    {name:<{width}}  {when}"
    if number > len(shown):
        yield f"    ... and {number - len(shown):,} more: `batch tasks` lists all"


def _tasks_of_pools(batch: BatchService) -> Iterator[str]:
    """The tasks whose runs a worker executes, and how many others it has."""
    own = sorted(name for name, task in batch.tasks.items() if task.pool in batch.roles.pools)
    others = len(batch.tasks) - len(own)
    shown = ", ".join(own[:MOST_NAMED]) + (
        f" and {len(own) - MOST_NAMED:,} more" if len(own) > MOST_NAMED else ""
    )
    yield f"  {len(own):,} task{'' if len(own) == 1 else 's'}{': ' if own else ''}{shown}"
    if others:
        yield f"  {others:,} task{'' if others == 1 else 's'} of other pools"


def warnings_of_worker(batch: BatchService) -> Iterator[str]:
    """Likely mistakes of a worker that has started: pools of which it has no task."""
    pools = {task.pool for task in batch.tasks.values()}
    without = batch.roles.pools - pools
    if without:
        known = (
            f"its tasks are of {_named(pools)}"
            if pools
            else f"it has no tasks in {batch.settings.TASKS_DIR}"
        )
        yield f"this worker has no task of {_named(without)}: {known}"


def _named(pools: Collection[str]) -> str:
    return f"the pool{'s' if len(pools) > 1 else ''} {', '.join(sorted(pools))}"
