"""Real services on one ledger, and a real receiver of their messages."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from batch_system.batch.ledger.duties import duties
from batch_system.batch.ledger.incidents.tables import incidents
from batch_system.database.engine import Database
from tests.batch.ledger_world import rows, until
from tests.incidents.receivers import HttpReceiver
from tests.processes import SERVE, Service, batch, service

FAILS = """
from pathlib import Path
from batch_system import BaseTask, Retry

class Load(BaseTask):
    name, schedule, retry = "load", None, Retry(attempts=3, wait=0.1)

    async def run(self) -> None:
        if not Path("mended").exists():
            raise ConnectionError("the shop does not answer")
"""
WAITS = """
import asyncio
from batch_system import BaseTask

class Wait(BaseTask):
    name, schedule = "wait", None

    async def run(self) -> None:
        await asyncio.sleep(3600)
"""


class World:
    """A folder of services on one ledger, and a receiver of their messages."""

    def __init__(
        self,
        folder: Path,
        ledger: Database,
        url: str,
        receiver: HttpReceiver,
        stack: AsyncExitStack,
    ) -> None:
        self.folder, self.ledger, self.receiver, self._stack = folder, ledger, receiver, stack
        self.settings = {
            **({"DATABASE_URL": url} if ledger.kind == "postgresql" else {}),
            "LEDGER_URL": url,
            "BATCH_ALERT_WEBHOOK": receiver.url,
            "BATCH_ALERT_NODE_AFTER": "1",
            "HEARTBEAT_SECONDS": "0.3",
            "LEASE_SECONDS": "3",
            "POLL_SECONDS": "0.1",
            "DRAIN_SECONDS": "0.2",
        }

    async def serve(self) -> Service:
        """Start a service, and wait until it is ready."""
        started = service(self.folder, SERVE, self.settings)
        running = await asyncio.to_thread(started.__enter__)
        self._stack.push_async_callback(asyncio.to_thread, started.__exit__, None, None, None)
        return running

    async def batch(self, *words: str) -> str:
        done = await asyncio.to_thread(batch, self.folder, *words, settings=self.settings)
        return done.stdout

    async def events(self, number: int) -> list[tuple[str, str]]:
        """The first events that have arrived, once this number is there: what happened, and the
        kind of incident.
        """

        async def arrived() -> list[tuple[str, str]]:
            events = [
                event for request in self.receiver.requests for event in request.json["events"]
            ]
            found = [(event["event"], event["incident"]["kind"]) for event in events]
            return found if len(found) >= number else []

        return list(await until(arrived))

    async def has_watch(self) -> bool:
        """Whether some service has taken the duty of the watch."""
        return bool(await rows(self.ledger, duties, name="watch"))

    async def incidents(self) -> list[dict[str, Any]]:
        return await rows(self.ledger, incidents)
