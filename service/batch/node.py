"""This process in the ledger: a row, and a heartbeat in a thread of its own that a blocked event loop can't stop."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import threading
from collections.abc import Iterable
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock
from service.batch import presence, slots
from service.batch.offload import offload
from service.batch.rescue import leave_nothing_running, rescue
from service.batch.tables import new_id, nodes
from service.database.engine import Database
from service.logs import get_logger

logger = get_logger("service.batch")


class Node:
    """One running process of the service."""

    def __init__(self, url: str, beat_seconds: float) -> None:
        self.id = new_id()
        self._folder = presence.folder_of(url)
        self._url = url
        self._beat_seconds = beat_seconds
        self._stopping = threading.Event()
        self._lag = LoopLag()

    async def register(self, connection: AsyncConnection, tasks: Iterable[str], now: datetime) -> None:
        self._presence = await offload(presence.Presence, self._folder, self.id)
        row = {
            "id": self.id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": package_version(),
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

    @property
    def is_beating(self) -> bool:
        return self._thread.is_alive()

    async def stop(self) -> None:
        """Stop beating."""
        self._stopping.set()
        await offload(self._thread.join, 5)

    async def leave(self, connection: AsyncConnection) -> None:
        now = await slots.now_of(connection)
        await leave_nothing_running(connection, self.id, now)
        await connection.execute(update(nodes).where(nodes.c.id == self.id).values(stopped_at=now))

    async def forget(self) -> None:
        """Nothing is left to be rescued, and that is committed."""
        await offload(self._presence.end)

    async def _beat_on(self) -> None:
        database = Database(self._url, setting="LEDGER_URL", pool_size=1, client=f"batch/{self.id}/heartbeat")
        is_well = True
        try:
            while not self._stopping.is_set():
                try:
                    await self._beat(database)
                    is_well = True
                except Exception as error:  # noqa: BLE001 - a background loop's boundary: the next beat may do better
                    if is_well:
                        cause = f"{type(error).__name__}: {error}".splitlines()[0]
                        logger.warning(f"the heartbeat does not reach the ledger: {cause}")
                    is_well = False
                self._stopping.wait(self._beat_seconds)
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
            dead = await rescue(connection, self._folder, now)
        for node in dead:
            presence.forget(self._folder, node)


async def record_loaded(connection: AsyncConnection, node: str, tasks: Iterable[str]) -> None:
    """Say which tasks a node has loaded by now."""
    await connection.execute(update(nodes).where(nodes.c.id == node).values(tasks=sorted(tasks)))


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


class Observer:
    """Which nodes live, judged by their counters on this process's own clock: no wall clock takes part.

    A node is dead when its counter was seen unchanged for a whole lease. While the ledger could not be read nobody was
    seen, so after a gap everybody counts as alive anew.
    """

    def __init__(self, lease_seconds: float) -> None:
        self._lease = lease_seconds
        self._seen: dict[str, tuple[int, float]] = {}
        self._looked_at = -math.inf

    async def live_tasks(self, connection: AsyncConnection) -> set[str]:
        """The names of the tasks that some live node has loaded."""
        statement = select(nodes.c.id, nodes.c.beats, nodes.c.tasks).where(nodes.c.stopped_at.is_(None))
        found = (await connection.execute(statement)).all()
        now = clock.boottime()
        if now - self._looked_at > self._lease / 2:
            self._seen = {}
        self._looked_at = now
        self._seen = {node: self._sight(node, beats, now) for node, beats, _ in found}
        live = (names for node, _, names in found if now - self._seen[node][1] < self._lease)
        return {name for names in live for name in names}

    def _sight(self, node: str, beats: int, now: float) -> tuple[int, float]:
        before = self._seen.get(node)
        return before if before is not None and before[0] == beats else (beats, now)


def package_version() -> str:
    try:
        return version("batch-system")
    except PackageNotFoundError:
        return "unknown"
