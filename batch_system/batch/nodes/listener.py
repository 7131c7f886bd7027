"""Listener: receives the notifications of PostgreSQL on the heartbeat's connection, which is open
anyway.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import asyncpg
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

from batch_system.batch.ledger.wakes import CHANNEL_SQL, ONLY_BY_POLLS, Wake
from batch_system.concurrency.background import is_set_within
from batch_system.concurrency.limits import limited
from batch_system.database import pooler
from batch_system.database.engine import Database
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

ANSWER_SECONDS = 10.0
"""How long sending a notification to itself may take."""
PROOF_SECONDS = 5.0
"""How long the notification may take to arrive."""
IN_USE_SECONDS = 0.02
"""The time between two checks whether the own connection is in use."""


class Listener:
    """Listens on each connection of `database` from its start, and so also on the new one after a
    lost connection.
    """

    def __init__(self, database: Database, node: str, on_wake: Callable[[Wake], None]) -> None:
        """`database`: has one connection at a time. The caller uses it regularly, and so opens a
        new one after a loss.
        """
        self._database = database
        self._node = node
        self._on_wake = on_wake
        self._proof = f"batch/{node} here"
        self._is_heard = asyncio.Event()
        self._proving: asyncio.Task[None] | None = None
        self._has_warned = False
        event.listen(database.engine.sync_engine, "connect", self._on_connect)

    async def stop(self) -> None:
        """End the test that may be in progress. The connection belongs to the database."""
        if self._proving is not None:
            self._proving.cancel()
            await asyncio.wait([self._proving])

    def _on_connect(self, connection: Any, _: Any) -> None:
        connection.run_async(self._listen)

    async def _listen(self, driver: asyncpg.Connection) -> None:
        try:
            channel = await driver.fetchval(f"SELECT {CHANNEL_SQL}")
            await driver.add_listener(channel, self._on_notification)
        except asyncpg.PostgresError as error:
            self._warn(f"refuses LISTEN ({error})")
            return
        self._on_wake(Wake(None))  # a notification may have come before
        if self._proving is not None:  # its notification may have gone to the connection before
            self._proving.cancel()
        self._proving = asyncio.create_task(self._prove(channel))

    def _on_notification(self, _: Any, __: int, ___: str, payload: str) -> None:
        if payload == self._proof:
            self._is_heard.set()
            if self._has_warned:
                self._has_warned = False
                logger.info(
                    f"{self._database.safe_url} ({self._database.setting}) passes notifications on "
                    "again"
                )
        else:
            self._on_wake(Wake.of(payload, self._node))

    async def _prove(self, channel: str) -> None:
        """Find out whether notifications arrive, because a pooler may accept LISTEN and then pass
        nothing on.
        """
        while not await self._notify_itself(channel):
            await asyncio.sleep(PROOF_SECONDS)
        while not await is_set_within(self._is_heard, PROOF_SECONDS):
            if not self._is_in_use():  # a use of the connection delays the notification
                self._warn(
                    "passes no notifications on, like a pooler such as PgBouncer in transaction "
                    f"mode (set {pooler.SETTING}=transaction if it is one)"
                )
                return

    async def _notify_itself(self, channel: str) -> bool:
        """Send itself a notification by another connection. Returns whether it was sent.

        The own connection must not be in use meanwhile, because a pooler passes on what arrives
        during a transaction.
        """
        self._is_heard.clear()
        url = self._database.url.render_as_string(hide_password=False)
        other = Database(
            url, setting=self._database.setting, pooled=False, client=f"batch/{self._node}"
        )
        try:
            async with limited(ANSWER_SECONDS), other.engine.connect() as connection:
                await connection.execute(
                    text("SELECT pg_notify(:c, :p)"), {"c": channel, "p": self._proof}
                )
                while self._is_in_use():
                    await asyncio.sleep(IN_USE_SECONDS)
                await connection.commit()
        except (DBAPIError, OSError):  # the polls report it
            return False
        return True

    def _is_in_use(self) -> bool:
        return cast(QueuePool, self._database.engine.pool).checkedout() > 0

    def _warn(self, trouble: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"{self._database.safe_url} ({self._database.setting}) {trouble}: {ONLY_BY_POLLS}"
            )
