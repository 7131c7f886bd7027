"""The database for sync runs: the work goes to the event loop, and the thread waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from service.database.session import get_db, home_loop
from service.database.writers import caller, session_place
from service.errors import BatchError

T = TypeVar("T")


def call_db(work: Callable[[Session], T], readonly: bool = False) -> T:
    """For sync runs: `call_db(lambda db: db.scalar(select(func.count(User.id))), readonly=True)`.

    `work` gets a session on the application's database, as `get_db()` has them: what it does not commit is rolled back.
    It runs on the event loop, so it should ask the database and return, and compute nothing long. What it raises is
    raised here. Raises BatchError on an event loop: there it is `async with get_db()`.
    """
    place = caller()

    async def in_session() -> T:
        session_place.set(place)
        async with get_db(readonly) as db:
            return await db.run_sync(work)

    return call_async(in_session())


def call_async(work: Coroutine[Any, Any, T]) -> T:
    """For sync runs: `call_async(start(OtherTask))`. Wait in this thread for a coroutine on the run's event loop.

    Where a task is called by hand, it has an event loop of its own. Raises BatchError on an event loop.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        loop = home_loop.get()
        return asyncio.run_coroutine_threadsafe(work, loop).result() if loop else asyncio.run(work)
    work.close()
    raise BatchError("call_db() and call_async() are for sync runs, and would stop the event loop here: await instead")
