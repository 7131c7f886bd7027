"""Lets tests change the instance of a task's class that each attempt creates, before its `run()` is
called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

from service.batch.tasks.base import BaseTask
from service.batch.tasks.registry import Task

Prepare = Callable[[Task, BaseTask], None]


def prepared(tasks: Mapping[str, Task], prepare: Prepare) -> dict[str, Task]:
    """Copies of these tasks. An attempt of one calls `prepare` with its new instance before it
    calls `run()`.
    """
    return {
        name: dataclasses.replace(task, cls=_maker(task, prepare)) for name, task in tasks.items()
    }


def _maker(task: Task, prepare: Prepare) -> type[BaseTask]:
    # A function will do, because an attempt only calls it.
    return cast(type[BaseTask], partial(_make, task, prepare))


def _make(task: Task, prepare: Prepare) -> BaseTask:
    instance = task.cls()
    prepare(task, instance)
    return instance
