"""Hints on stderr: why a run does not begin now, and that no service is running."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batch_system.verbs.following import Operations

NO_SERVICE = (
    "no service is running, so no task fires and no queued run begins; `batch status` says more"
)


async def hint_if_held(operations: Operations, task: str) -> str | None:
    """The reason why a run does not begin now: its task is paused, or no running service has the
    task. Else None.
    """
    from batch_system.verbs.tasks import ShowPause

    if (pause := (await operations(ShowPause(name=task))).pause) is not None:
        return f"{task} is paused by {pause.by}: its runs wait until `batch resume {task}`"
    return await hint_if_unserved(operations, task)


async def hint_if_unserved(operations: Operations, task: str) -> str | None:
    """A hint for a user who waits for a run, if no running service has the task. Else None."""
    from batch_system.verbs.system import ListNodes, ListPools

    living = (await operations(ListNodes(living=True))).nodes
    if any(task in node.tasks for node in living if node.fires):
        return next(
            (
                pool.problem
                for pool in (await operations(ListPools())).pools
                if task in pool.missing
            ),
            None,
        )
    return f"no running service has the task {task}: its runs wait for the next service that has it"


async def hint_without_service(operations: Operations) -> str | None:
    """A hint for a user who looks at tasks or runs, if no service is running. Else None."""
    from batch_system.verbs.system import ListNodes

    living = (await operations(ListNodes(living=True))).nodes
    return None if any(node.fires for node in living) else NO_SERVICE


def warn(hint: str | None) -> None:
    """Print a hint as a line on stderr, if there is one."""
    from batch_system import console

    if hint is not None:
        console.warn(f"batch: {hint}")
