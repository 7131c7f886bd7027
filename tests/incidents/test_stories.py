"""What reaches a person, with real processes: real services, real signals, a real receiver of messages."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from service import clock
from service.batch.ledger import tables
from service.batch.ledger.incidents.tables import incidents, outbox
from service.batch.ledger.people.access_tables import duties
from service.database.engine import Database
from tests.batch.ledger_world import rows, until
from tests.incidents.receivers import HttpReceiver, http_receiver
from tests.processes import SERVE, Service, batch, service
from tests.test_serve import make_folder

FAILS = """
from pathlib import Path
from service import BaseTask, Retry

class Load(BaseTask):
    name, schedule, retry = "load", None, Retry(attempts=3, wait=0.1)

    async def run(self) -> None:
        if not Path("mended").exists():
            raise ConnectionError("the shop does not answer")
"""
WAITS = """
import asyncio
from service import BaseTask

class Wait(BaseTask):
    name, schedule = "wait", None

    async def run(self) -> None:
        await asyncio.sleep(3600)
"""
FORTY = """
from service import BaseTask

class _Tick(BaseTask):
    schedule, missed = "0 * * * *", "skip"

    async def run(self) -> None: ...

""" + "\n".join(f'class Tick{n}(_Tick):\n    name = "tick{n}"\n' for n in range(40))

In = Callable[..., Awaitable[Service]]


class World:
    """A folder of services on one ledger, and a receiver of their messages."""

    def __init__(self, folder: Path, ledger: Database, url: str, receiver: HttpReceiver, stack: AsyncExitStack) -> None:
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
        """The first events that have arrived, once there are so many: each what happened, and the kind of incident."""

        async def arrived() -> list[tuple[str, str]]:
            events = [event for request in self.receiver.requests for event in request.json["events"]]
            found = [(event["event"], event["incident"]["kind"]) for event in events]
            return found if len(found) >= number else []

        return list(await until(arrived))

    async def has_watch(self) -> bool:
        """Whether some service has taken the duty of the watch."""
        return bool(await rows(self.ledger, duties, name="watch"))

    async def incidents(self) -> list[dict[str, Any]]:
        return await rows(self.ledger, incidents)


@pytest.fixture
async def world(ledger: Database, ledger_url: str, tmp_path: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        receiver = await stack.enter_async_context(http_receiver())
        folder = make_folder(tmp_path, load=FAILS, wait=WAITS)
        yield World(folder, ledger, ledger_url, receiver, stack)


@asynccontextmanager
async def quiet(world: World, seconds: float = 2.0) -> AsyncIterator[None]:
    """Nothing more is sent in the block, and for some seconds after it."""
    number = len(world.receiver.requests)
    yield
    await asyncio.sleep(seconds)
    assert len(world.receiver.requests) == number


async def test_a_failure_is_told_once_after_its_last_attempt_and_its_recovery_once(world: World) -> None:
    await world.serve()
    await world.batch("run", "load", "--queue")
    assert await world.events(1) == [("opened", "failed")]
    (request,) = world.receiver.requests
    (event,) = request.json["events"]
    assert (event["incident"]["task"], event["incident"]["count"]) == ("load", 1)
    assert len(await rows(world.ledger, tables.attempts)) == 3
    (world.folder / "mended").touch()
    await world.batch("retry", event["incident"]["run"])

    async def is_closed() -> bool:
        return (await world.incidents())[0]["closed_why"] == "made_good"

    await until(is_closed)
    async with world.ledger.engine.begin() as connection:  # what follows a message waits twenty seconds
        await connection.execute(update(outbox).where(outbox.c.sent_at.is_(None)).values(due_at=clock.now()))
    assert await world.events(2) == [("opened", "failed"), ("closed", "failed")]


async def test_a_failure_that_a_killed_service_has_noticed_is_told_by_the_next_one_with_the_same_id(
    world: World,
) -> None:
    world.receiver.answers = ["hang", "204 No Content"]
    first = await world.serve()
    await world.batch("run", "load", "--queue")
    await world.events(1)
    first.process.send_signal(signal.SIGKILL)
    await asyncio.to_thread(first.process.wait)
    await world.serve()
    events = await world.events(2)
    assert events[:2] == [("opened", "failed")] * 2
    told = {request.headers["webhook-id"] for request in world.receiver.requests[:2]}
    assert len(told) == 1
    assert [row["count"] for row in await world.incidents() if row["kind"] == "failed"] == [1]


async def test_an_outage_in_which_forty_tasks_missed_slots_is_one_message(world: World) -> None:
    make_folder(world.folder, forty=FORTY)
    first = await world.serve()
    await until(world.has_watch)
    await asyncio.to_thread(first.stop)
    ago = clock.now() - timedelta(hours=5)
    async with world.ledger.engine.begin() as connection:
        await connection.execute(update(tables.schedules).values(fired_until=ago, valid_from=ago))
        await connection.execute(update(tables.nodes).values(seen_at=ago, stopped_at=ago))
    await world.serve()
    assert await world.events(1) == [("opened", "down")]

    async def all_missed() -> bool:
        return len(await rows(world.ledger, tables.missed)) == 40

    async with quiet(world):
        await until(all_missed)
    assert [row["kind"] for row in await world.incidents()] == ["down"]


async def test_a_killed_node_is_told_only_if_nobody_goes_on_with_its_work(world: World) -> None:
    first = await world.serve()
    await world.batch("run", "wait", "--queue")

    async def is_running() -> bool:
        return bool(await rows(world.ledger, state="running"))

    await until(is_running)
    second = await world.serve()
    async with quiet(world, 3.0):
        first.process.send_signal(signal.SIGKILL)

        async def goes_on() -> bool:
            (run,) = await rows(world.ledger)
            return bool(run["state"] == "running" and run["fence"] > 1)

        await until(goes_on)
    assert await world.incidents() == []
    assert second.process.poll() is None


async def test_a_frozen_watch_is_relieved_and_nothing_is_noticed_twice(world: World) -> None:
    first = await world.serve()
    await until(world.has_watch)
    await world.serve()
    await asyncio.to_thread(first.freeze, world.settings["LEDGER_URL"])
    await world.batch("run", "load", "--queue")
    assert await world.events(1) == [("opened", "failed")]
    async with quiet(world):
        first.process.send_signal(signal.SIGCONT)
    assert [row["count"] for row in await world.incidents() if row["kind"] == "failed"] == [1]
