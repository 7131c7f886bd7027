"""Gives tasks and other code the operations of the service on their event loop, or opens
operations.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakKeyDictionary

from batch_system.operations.asking.context import Loaded
from batch_system.operations.operations import Operations, open_operations
from batch_system.settings.settings import Settings

_services: WeakKeyDictionary[asyncio.AbstractEventLoop, Operations] = WeakKeyDictionary()


def use_operations(operations: Operations) -> None:
    """Make operations_here() give these operations of a service on the running event loop."""
    _services[asyncio.get_running_loop()] = operations


def use_no_operations() -> None:
    """Undo use_operations() on the running event loop."""
    _services.pop(asyncio.get_running_loop(), None)


@asynccontextmanager
async def operations_here(settings: Settings) -> AsyncIterator[Operations]:
    """The operations of the service on the running event loop; without a service they are opened by
    the settings.

    `settings`: the settings of backups; they also apply to the operations of the service.
    """
    if (operations := _services.get(asyncio.get_running_loop())) is not None:
        yield operations.under(settings)
        return
    async with open_operations(settings, Loaded) as opened:
        yield opened
