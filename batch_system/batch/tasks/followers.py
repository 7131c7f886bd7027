"""Tasks that wait for others: checks their declarations together, and gives followers their
slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

from batch_system.batch.tasks.base import BaseTask
from batch_system.batch.tasks.broken_files import BrokenFile
from batch_system.batch.tasks.registry import Task, TaskRegistry
from batch_system.logs import get_logger

logger = get_logger(__name__)


def settle() -> list[BrokenFile]:
    """Give the registered tasks that follow others their slots. Returns those that can't be used,
    which are removed.

    Tasks that wait for each other, or for a task without slots, are refused. A task that is not
    registered here may belong to another process, so waiting for it is not refused.
    """
    tasks = TaskRegistry.tasks()
    refused = {
        name: f"tasks wait for each other: {' after '.join(cycle)}"
        for cycle in cycles(_awaited(tasks))
        for name in cycle
    }
    for task in tasks.values():
        for upstream in (
            task.after.tasks if task.after is not None and task.name not in refused else ()
        ):
            if (
                upstream in tasks
                and tasks[upstream].schedule is None
                and tasks[upstream].after is None
            ):
                refused[task.name] = (
                    f"after names {upstream}, which has no schedule and so no slots to wait for; "
                    "for runs that are started by code there is start_all(…, then=…)"
                )
    TaskRegistry.remove(set(refused))
    for name, error in refused.items():
        logger.error(f"{tasks[name].source} can't be used: task {name}: {error}")
    TaskRegistry.replace(dict(_followers(TaskRegistry.tasks())))
    return [
        BrokenFile(tasks[name].source, f"task {name}: {error}", "", name)
        for name, error in refused.items()
    ]


def _followers(tasks: Mapping[str, Task]) -> Iterator[tuple[str, Task]]:
    """The tasks that follow others, with the schedule of the task that they follow and, unless they
    have their own, its missed policy.
    """
    for task in tasks.values():
        if task.follows is None:
            continue
        leader = task
        while leader.follows is not None and leader.follows in tasks:
            leader = tasks[leader.follows]
        missed = (
            leader.policies.missed if task.cls.missed is BaseTask.missed else task.policies.missed
        )
        policies = replace(task.policies, missed=missed)
        yield (
            task.name,
            replace(task, schedule=leader.schedule, zone=leader.zone, policies=policies),
        )


def _awaited(tasks: Mapping[str, Task]) -> dict[str, tuple[str, ...]]:
    return {task.name: task.after.tasks for task in tasks.values() if task.after is not None}


def cycles(waiting: Mapping[str, tuple[str, ...]]) -> Iterator[list[str]]:
    """The names of the tasks of each cycle, each waiting for the next one. The last name is the
    first one again.

    `waiting`: the tasks that each task waits for.
    """
    while True:
        try:
            TopologicalSorter(waiting).prepare()
            return
        except CycleError as error:
            cycle = error.args[1][::-1]
            yield cycle
            waiting = {name: upstreams for name, upstreams in waiting.items() if name not in cycle}
