"""How a command calls the operations: on a new event loop, with the databases of the settings."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from service.cli.options import user, wait_for
from service.errors import ErrorKind, InvalidSetting

if TYPE_CHECKING:
    from service.operations.context import Loaded
    from service.operations.operations import Operations

T = TypeVar("T")

FAILED, MISTAKE, OUT_OF_ORDER = 1, 2, 3

EXIT_CODES: dict[ErrorKind, int] = {
    "not_found": MISTAKE,
    "invalid": MISTAKE,
    "conflict": MISTAKE,
    "forbidden": MISTAKE,
    "unavailable": OUT_OF_ORDER,
    "damaged": OUT_OF_ORDER,
}
"""The exit code of a command by the kind of its error. (A run that failed is no error; its exit code is FAILED.)"""


def ask(
    work: Callable[[Operations], Awaitable[T]],
    *,
    needs_tasks: bool = True,
    log_level: str = "CRITICAL",
) -> T:
    """The result of `work`, which is called with the operations of the settings, asked by the user who types this.

    `needs_tasks`: a tasks folder that is missing is an error, raised where a task is needed; else there are none then:
    what the ledger knows can be shown on a machine without the folder.
    """
    from service import logs

    logs.set_up(log_level, lazily=True)
    return wait_for(_asked(work, needs_tasks))


async def _asked(work: Callable[[Operations], Awaitable[T]], needs_tasks: bool) -> T:
    from service.config import get_settings
    from service.operations.operations import open_operations

    loaded = functools.cache(_load if needs_tasks else _load_if_any)
    async with open_operations(get_settings(), loaded, user()) as operations:
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
    from service.operations.context import Loaded

    with suppress(InvalidSetting):
        return _load()
    return Loaded()
