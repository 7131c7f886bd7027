"""The operations that code on an event loop can use, such as a task: those of the service there, or opened ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakKeyDictionary

from service.config import Settings
from service.operations.context import Loaded
from service.operations.operations import Operations, open_operations

_services: WeakKeyDictionary[asyncio.AbstractEventLoop, Operations] = WeakKeyDictionary()


def use_operations(operations: Operations) -> None:
    """Make `operations_here` on this event loop give the operations of a service."""
    _services[asyncio.get_running_loop()] = operations


def use_no_operations() -> None:
    _services.pop(asyncio.get_running_loop(), None)


@asynccontextmanager
async def operations_here(settings: Settings) -> AsyncIterator[Operations]:
    """The operations of the service on this event loop; where there is none, they are opened from the settings.

    `settings`: also for the service's, whose backups then are as these say.
    """
    if (operations := _services.get(asyncio.get_running_loop())) is not None:
        yield operations.under(settings)
        return
    async with open_operations(settings, Loaded) as opened:
        yield opened
