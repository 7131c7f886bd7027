"""How a command calls the operations: on a new event loop, with the databases of the settings."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from service.cli.options import actor, wait_for
from service.errors import ErrorKind, InvalidSetting

if TYPE_CHECKING:
    from service.operations.context import Loaded
    from service.operations.operations import Operations

T = TypeVar("T")

FAILED, MISTAKE, OUT_OF_ORDER, INTERRUPTED = 1, 2, 3, 130

EXIT_CODES: dict[ErrorKind, int] = {
    "not_found": MISTAKE,
    "invalid": MISTAKE,
    "conflict": MISTAKE,
    "forbidden": MISTAKE,
    "unavailable": OUT_OF_ORDER,
    "damaged": OUT_OF_ORDER,
}
"""The exit code of a command by the kind of its error. A failed run is not such an error; its exit code is FAILED."""


def ask(
    work: Callable[[Operations], Awaitable[T]],
    *,
    needs_tasks: bool = True,
    log_level: str = "CRITICAL",
) -> T:
    """Call `work` with the operations of the user who has typed the command, and return its result.

    `needs_tasks`: whether a missing folder of tasks is an error, which is raised when a task is needed. Otherwise the
    command has no tasks then, so that it can show what is in the ledger on a machine without the folder.
    """
    from service import logs

    logs.set_up(log_level, lazily=True)
    return wait_for(_call(work, needs_tasks))


async def _call(work: Callable[[Operations], Awaitable[T]], needs_tasks: bool) -> T:
    from service.config import get_settings
    from service.operations.operations import open_operations

    load = functools.cache(_load if needs_tasks else _load_if_any)
    async with open_operations(get_settings(), load, actor()) as operations:
        return await work(operations)


def _load() -> Loaded:
    """Import the files in TASKS_DIR. Raises InvalidSetting."""
    from service.batch.tasks.discovery import load_tasks
    from service.batch.tasks.registry import TaskRegistry
    from service.config import get_settings
    from service.operations.context import Loaded

    broken = load_tasks(get_settings().TASKS_DIR)
    return Loaded(TaskRegistry.tasks(), broken)


def _load_if_any() -> Loaded:
    """Import the files in TASKS_DIR; no tasks if there is no such folder."""
    from service.operations.context import Loaded

    with suppress(InvalidSetting):
        return _load()
    return Loaded()
