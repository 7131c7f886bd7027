"""A site for tests in a browser: two real processes on one ledger, with tasks that fail until they
are told not to.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import text

from batch_system.config import Settings
from batch_system.database.engine import Database
from batch_system.operations.asking.actor import Actor
from batch_system.operations.asking.context import Loaded
from batch_system.operations.operations import Operations
from batch_system.operations.people import access
from tests.processes import UVICORN, Service, batch, process

TASKS = '''
import asyncio
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from batch_system import BaseTask, ItemTask, Limit, Skip, current_run, get_logger

logger = get_logger(__name__)


class Tick(BaseTask):
    """Succeeds each second."""

    name, schedule, overlap = "tick", "* * * * * *", "allow"

    async def run(self):
        return "ticked"


class Daily(BaseTask):
    """Is due once a day."""

    name, schedule = "daily", "0 0 * * *"

    async def run(self):
        return "done"


class Orders(BaseTask):
    """Fails until there is a file with the name "good"."""

    name, schedule, owner, runbook = "orders", None, "shop team", "https://example.com/orders"

    async def run(self, day: int = 1):
        logger.info(f"day {day}")
        if not Path("good").exists():
            raise ValueError("<b>no customer</b> with this number")


class Long(BaseTask):
    """Goes on until it is cancelled, and says how far it is."""

    name, schedule = "long", None

    async def run(self):
        for number in range(1, 1_000):
            logger.info(f"line {number} of the log")
            current_run().progress(number, 1_000)
            await asyncio.sleep(0.1)


class Chatty(BaseTask):
    """Logs 300 lines, one of them as an error if it is asked to."""

    name, schedule = "chatty", None

    async def run(self, error: int = 0):
        for number in range(1, 301):
            logger.log(40 if number == error else 20, f"this is line {number} of the log")


class Wide(BaseTask):
    """Has names, keys and errors of the largest size, in one word each."""

    name, schedule, owner = "wide_" + "w" * 92, None, "owner_" + "o" * 80
    limit = Limit(2, key="customer")

    async def run(self, customer: str = "c" * 90):
        logger.error("line_" + "l" * 3_000)
        raise ValueError("error_" + "e" * 3_000)


class Base(DeclarativeBase):
    pass


class Parcel(Base):
    __tablename__ = "parcels"
    id: Mapped[int] = mapped_column(primary_key=True)
    address: Mapped[str]


class Parcels(ItemTask):
    """Sets one of three items aside."""

    name, schedule, skip = "parcels", None, Skip(limit=10, on=ValueError)

    def items(self):
        return select(Parcel)

    async def save(self, item, fetched, db):
        if not item.address and not Path("good").exists():
            raise ValueError("no address")
'''
SETTINGS = {
    "POLL_SECONDS": "0.2",
    "HEARTBEAT_SECONDS": "0.5",
    "LEASE_SECONDS": "10",
    "BATCH_REQUESTS_PER_SECOND": "10000",
}


@dataclass
class Site:
    """`nodes`: the processes. `secret`: of an admin's token. `folder`: in which the tasks run.
    `databases`: URLs.
    """

    folder: Path
    databases: tuple[str, str]
    nodes: list[Service]
    secret: str

    @property
    def url(self) -> str:
        """The address of the first process."""
        return self.nodes[0].url

    def ask(self, number: int = 0) -> httpx.AsyncClient:
        """A program that asks one of the processes."""
        headers = {"Authorization": f"Bearer {self.secret}"}
        base = f"{self.nodes[number].url}/api/v1"
        return httpx.AsyncClient(base_url=base, headers=headers, timeout=60, trust_env=False)

    async def start(self, task: str, **params: Any) -> str:
        """Start a run; returns its id."""
        async with self.ask() as client:
            answer = await client.post(f"/tasks/{task}/runs", json={"parameters": params})
            assert answer.status_code < 300, answer.text
            return str(answer.json()["id"])

    async def run(self, run: str) -> dict[str, Any]:
        """A run as the API shows it."""
        async with self.ask() as client:
            return dict((await client.get(f"/runs/{run}")).json())

    async def ended(self, run: str) -> dict[str, Any]:
        """A run that has ended."""

        async def has_ended() -> bool:
            return (await self.run(run))["finished_at"] is not None

        await until(has_ended)
        return await self.run(run)


async def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait until an async condition holds."""
    give_up_at = asyncio.get_running_loop().time() + seconds
    while not await condition():
        assert asyncio.get_running_loop().time() < give_up_at, condition
        await asyncio.sleep(0.05)


@asynccontextmanager
async def serve(folder: Path, url: str, ledger_url: str, nodes: int = 2) -> AsyncIterator[Site]:
    """Start the processes, make a token, and make a backup."""
    (folder / "tasks").mkdir()
    (folder / "tasks" / "shop.py").write_text(TASKS)
    (folder / "tasks" / "broken.py").write_text("import this_module_is_missing\n")
    settings = {**SETTINGS, "DATABASE_URL": url, "LEDGER_URL": ledger_url}
    with ExitStack() as stack:
        started = []
        for _ in range(nodes):
            started.append(stack.enter_context(process(folder, UVICORN, settings)))
            await asyncio.to_thread(started[-1].wait_until_ready)
        application = Database(url, setting="DATABASE_URL", pooled=False)
        async with application.engine.begin() as connection:
            await connection.execute(
                text("CREATE TABLE parcels (id INTEGER PRIMARY KEY, address TEXT NOT NULL)")
            )
            await connection.execute(
                text("INSERT INTO parcels VALUES (1, 'here'), (2, ''), (3, 'there')")
            )
        await application.dispose()
        ledger = Database(ledger_url, setting="LEDGER_URL", pooled=False)
        operations = Operations(
            ledger, ledger, Loaded, Settings(_env_file=None), actor=Actor("tests")
        )
        token = await access.create_token(operations.context, "ann", "admin")
        await ledger.dispose()
        made = await asyncio.to_thread(batch, folder, "backup", "create", settings=settings)
        assert made.returncode == 0, made.stderr
        yield Site(folder, (url, ledger_url), started, token.secret)
