"""Likely mistakes in the pool of a task, and in its bound of memory. Pure: no database, no
settings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from service.batch.tasks.registry import Task
from service.settings.pools import DEFAULT_POOL


def unserved(task: Task, served: Collection[str] | None) -> Iterator[tuple[str, str]]:
    """The warning that the pool of the task is not served. `served`: the names of the other pools;
    None if not known.
    """
    if served is not None and task.pool != DEFAULT_POOL and task.pool not in served:
        yield (
            "unserved-pool",
            f"no process serves pool {task.pool}, so its runs wait: set "
            f"BATCH_POOL_{task.pool.upper()} to process or nodes, or start `batch work --pool "
            f"{task.pool}`",
        )


def unbounded(task: Task) -> Iterator[tuple[str, str]]:
    """The note that the bound of memory is not enforced."""
    if task.policies.memory is not None and task.pool == DEFAULT_POOL:
        yield (
            "memory-without-process",
            "memory has no effect in pool default, whose runs share one process; a pool with "
            "BATCH_POOL_…=process enforces the bound",
        )
