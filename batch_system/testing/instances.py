"""Lets tests change the task instance of each attempt before its `run()`. Alone, because failures,
kills and upstreams all use it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

from batch_system.batch.tasks.base import BaseTask
from batch_system.batch.tasks.registry import Task

Prepare = Callable[[Task, BaseTask], None]


def prepared(tasks: Mapping[str, Task], prepare: Prepare) -> dict[str, Task]:
    """Copies of these tasks. Each attempt of one calls `prepare` with its new instance before it
    calls `run()`.
    """
    return {
        name: dataclasses.replace(task, cls=_maker(task, prepare)) for name, task in tasks.items()
    }


def _maker(task: Task, prepare: Prepare) -> type[BaseTask]:
    # A function is enough, because an attempt only calls it.
    return cast(type[BaseTask], partial(_make, task, prepare))


def _make(task: Task, prepare: Prepare) -> BaseTask:
    instance = task.cls()
    prepare(task, instance)
    return instance
