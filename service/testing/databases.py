"""Databases for tests, and waiting for async work in a test that is not."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy import make_url

from service.batch.ledger.migration import LEDGER_HISTORY
from service.config import async_url
from service.database.engine import Database
from service.database.histories import APPLICATION_HISTORIES
from service.database.migrate import migrate

T = TypeVar("T")


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, on an event loop in a thread: the caller's may be running."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


async def migrated(application_url: str, ledger_url: str) -> None:
    """Make all tables."""
    for url, histories in ((application_url, APPLICATION_HISTORIES), (ledger_url, (LEDGER_HISTORY,))):
        database = Database(async_url(url), setting="DATABASE_URL", pooled=False)
        await migrate(database, *histories)
        await database.dispose()


def name_of(url: str) -> str:
    return str(make_url(url).database)
