"""Signing off: a node that stops says so in the ledger, and its runs are interrupted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import database_time
from service.batch.nodes import orphans
from service.batch.nodes.node import Node
from service.database.engine import Database
from service.server import deploys
from service.server.probes import write_if_reachable
from service.settings.settings import Settings


class SignOff:
    """Signs a node off in the ledger, once."""

    def __init__(self, node: Node, settings: Settings) -> None:
        self._node = node
        self._settings = settings
        self._is_done = False

    async def through(self, ledger: Database) -> None:
        """Sign off, if the ledger can be reached."""
        if await write_if_reachable(ledger, self._write):
            await self._node.unlock()
            self._is_done = True

    def at_once(self) -> None:
        """Sign off from another thread, right before the process is ended."""
        self._node.fall_silent()
        if not self._is_done and asyncio.run(self._through_a_connection_of_its_own(self._write)):
            self._node.unlock_at_once()

    def accuse(self, run: str, what: str) -> None:
        """Write from another thread what this run does to this node, right before the process is
        ended.
        """
        asyncio.run(
            self._through_a_connection_of_its_own(
                lambda c: orphans.accuse(c, self._node.id, run, what)
            )
        )

    async def _write(self, connection: AsyncConnection) -> None:
        await self._node.leave(connection)
        if self._node.roles.fires:
            await deploys.record_stop(
                connection, self._node.id, await database_time.now_of(connection)
            )

    async def _through_a_connection_of_its_own(
        self, write: Callable[[AsyncConnection], Awaitable[None]]
    ) -> bool:
        settings, client = self._settings, f"batch/{self._node.id}"
        ledger = Database(
            settings.ledger_url,
            setting=settings.ledger_setting,
            pooled=False,
            client=client,
            waits_briefly=True,
        )
        return await write_if_reachable(ledger, write)
