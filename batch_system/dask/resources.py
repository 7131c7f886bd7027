"""The resources by which Dask finds a worker for a ticket: the pool and the task of its node, and
its memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from batch_system.batch.placing.placer import Needs

MEMORY = "batch-memory"
"""The memory limit of a worker, in bytes. A ticket of a task with `memory` takes that much of
it.
"""


def of_pool(pool: str) -> str:
    return f"batch-pool-{pool}"


def of_task(pool: str, task: str) -> str:
    return f"batch-task-{pool}-{task}"


def offered(
    pools: Mapping[str, Iterable[str]], places: int, memory: int | None
) -> dict[str, float]:
    """The resources of a worker whose node has these tasks by pool. `places`: how many runs it
    executes at once.
    """
    tasks = {of_task(pool, task): float(places) for pool, names in pools.items() for task in names}
    return (
        {of_pool(pool): float(places) for pool in pools}
        | tasks
        | ({MEMORY: float(memory)} if memory else {})
    )


def required(task: str, needs: Needs, further: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The resources that a ticket takes from a worker. `further`: those from the setting of the
    pool.
    """
    own = {of_task(needs.pool, task): 1.0, **dict(further)}
    return own | ({MEMORY: float(needs.memory)} if needs.memory else {})


def places(offers: Mapping[str, float], pool: str, further: Iterable[tuple[str, float]]) -> int:
    """How many tickets of the pool, which take `further`, a worker with these resources has room
    for.
    """
    rooms = [
        offers.get(of_pool(pool), 0.0),
        *(offers.get(name, 0.0) // number for name, number in further),
    ]
    return int(min(rooms))


def has_room(offers: Mapping[str, float], takes: Mapping[str, float]) -> bool:
    """Whether an idle worker with these resources could execute such a ticket."""
    return all(offers.get(name, 0.0) >= number for name, number in takes.items())
