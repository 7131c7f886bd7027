"""This process in the ledger: a row, and a heartbeat in a thread of its own that a blocked event loop can't stop."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterable
from datetime import datetime, timedelta
from importlib.metadata import PackageNotFoundError, version

from sqlalchemy import insert, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock
from service.batch import slots
from service.batch.presence import Presence
from service.batch.rescue import leave_nothing_running, rescue
from service.batch.tables import new_id, nodes
from service.database.engine import Database
from service.errors import DatabaseError
from service.logs import get_logger

logger = get_logger("service.batch")


class Node:
    """One running process of the service."""

    def __init__(self, url: str, beat_seconds: float) -> None:
        self.id = new_id()
        self._url = url
        self._beat_seconds = beat_seconds
        self._stopping = threading.Event()
        self._lag = LoopLag()

    async def register(self, connection: AsyncConnection, tasks: Iterable[str], now: datetime) -> None:
        self._presence = await asyncio.to_thread(Presence, self.id)
        row = {
            "id": self.id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": _version(),
            "started_at": now,
            "seen_at": now,
            "draining": False,
            "tasks": sorted(tasks),
        }
        await connection.execute(insert(nodes).values(row))

    def start(self) -> None:
        """Beat from now on. Call it on the event loop whose lag is to be measured."""
        self._lag.loop = asyncio.get_running_loop()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._beat_on()), name="batch-heartbeat", daemon=True
        )
        self._thread.start()

    async def drain(self, connection: AsyncConnection) -> None:
        await connection.execute(update(nodes).where(nodes.c.id == self.id).values(draining=True))

    async def stop(self) -> None:
        """Stop beating."""
        self._stopping.set()
        await asyncio.to_thread(self._thread.join, self._beat_seconds + 5)

    async def leave(self, connection: AsyncConnection) -> None:
        await asyncio.to_thread(self._presence.end)
        now = await slots.now_of(connection)
        await leave_nothing_running(connection, self.id, now)
        await connection.execute(update(nodes).where(nodes.c.id == self.id).values(stopped_at=now))

    async def _beat_on(self) -> None:
        database = Database(self._url, setting="LEDGER_URL", pool_size=1, client=f"batch/{self.id}/heartbeat")
        is_well = True
        try:
            while not self._stopping.is_set():
                try:
                    await self._beat(database)
                    is_well = True
                except (DBAPIError, DatabaseError, OSError) as error:
                    if is_well:
                        logger.warning(f"the heartbeat can't reach the ledger: {str(error).splitlines()[0]}")
                    is_well = False
                await asyncio.to_thread(self._stopping.wait, self._beat_seconds)
        finally:
            await database.dispose()

    async def _beat(self, database: Database) -> None:
        async with database.engine.begin() as connection:
            now = await slots.now_of(connection)
            values = {
                "beats": nodes.c.beats + 1,
                "seen_at": now,
                "loop_lag": self._lag.take(),
            }
            await connection.execute(update(nodes).where(nodes.c.id == self.id).values(values))
            await rescue(connection, now)


class LoopLag:
    """How long a callback waits on the event loop, in seconds, as seen from another thread."""

    loop: asyncio.AbstractEventLoop

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._answered = 0.0

    def take(self) -> float:
        """The last answer; while none comes, the time since it was asked for."""
        if self._asked_at is not None:
            return clock.monotonic() - self._asked_at
        self._asked_at = clock.monotonic()
        try:
            self.loop.call_soon_threadsafe(self._answer)
        except RuntimeError:  # the loop is closed
            self._asked_at = None
        return self._answered

    def _answer(self) -> None:
        asked_at, self._asked_at = self._asked_at, None
        if asked_at is not None:
            self._answered = clock.monotonic() - asked_at


async def tasks_of_live_nodes(connection: AsyncConnection, now: datetime, lease_seconds: float) -> set[str]:
    """The names of the tasks that some live node has loaded."""
    alive = nodes.c.stopped_at.is_(None) & (nodes.c.seen_at > now - timedelta(seconds=lease_seconds))
    rows = (await connection.execute(select(nodes.c.tasks).where(alive))).scalars()
    return {name for names in rows for name in names}


def _version() -> str:
    try:
        return version("batch-system")
    except PackageNotFoundError:
        return "unknown"
