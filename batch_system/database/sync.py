"""Database access for sync runs: the thread passes the work to the event loop and waits for the
result.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from batch_system.database.session import get_db
from batch_system.database.writers import caller, session_place
from batch_system.errors import BatchError

T = TypeVar("T")

home_loop: ContextVar[asyncio.AbstractEventLoop | None] = ContextVar("home_loop", default=None)
"""The event loop of the current run, for use in the run's threads."""


def call_db(work: Callable[[Session], T], readonly: bool = False) -> T:
    """For sync runs: `call_db(lambda db: db.scalar(select(func.count(User.id))), readonly=True)`.

    `work` gets a session on the application's database like that of `get_db()`: changes that it
    does not commit are rolled back. It runs on the event loop, so it should only use the database
    and not compute for long. Returns the result of `work`, and raises its errors. Raises BatchError
    on an event loop: use `async with get_db()` there.
    """
    place = caller()

    async def in_session() -> T:
        session_place.set(place)
        async with get_db(readonly) as db:
            return await db.run_sync(work)

    return call_async(in_session())


def call_async(work: Coroutine[Any, Any, T]) -> T:
    """For sync runs: run a coroutine on the run's event loop, and wait for it:
    `call_async(start(OtherTask))`.

    Outside a service the coroutine gets an event loop of its own. Raises BatchError on an event
    loop.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        loop = home_loop.get()
        return asyncio.run_coroutine_threadsafe(work, loop).result() if loop else asyncio.run(work)
    work.close()
    raise BatchError(
        "call_db() and call_async() are for sync runs, and would block the event loop here: use "
        "await"
    )
