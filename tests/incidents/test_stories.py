"""What reaches a person, with real processes: real services, real signals, a real receiver of
messages.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

from sqlalchemy import update

from batch_system import clock
from batch_system.batch.ledger import tables
from batch_system.batch.ledger.incidents.tables import outbox
from tests.batch.ledger_world import rows, until
from tests.incidents.world import World
from tests.server.test_serve import make_folder

EMPTY = """
from batch_system import BaseTask

class Import(BaseTask):
    name, schedule = "import", None
    expect = lambda result: result["rows"] > 0

    async def run(self) -> dict[str, int]:
        return {"rows": 0}
"""
FORTY = """
from batch_system import BaseTask

class _Tick(BaseTask):
    schedule, missed = "0 * * * *", "skip"

    async def run(self) -> None: ...

""" + "\n".join(f'class Tick{n}(_Tick):\n    name = "tick{n}"\n' for n in range(40))


@asynccontextmanager
async def quiet(world: World, seconds: float = 2.0) -> AsyncIterator[None]:
    """Nothing more is sent in the block, and for some seconds after it."""
    number = len(world.receiver.requests)
    yield
    await asyncio.sleep(seconds)
    assert len(world.receiver.requests) == number


async def test_a_failure_is_told_once_after_its_last_attempt_and_its_recovery_once(
    world: World,
) -> None:
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
    # What follows a message waits twenty seconds.
    async with world.ledger.engine.begin() as connection:
        await connection.execute(
            update(outbox).where(outbox.c.sent_at.is_(None)).values(due_at=clock.now())
        )
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
        await connection.execute(
            update(tables.nodes).values(started_at=ago, seen_at=ago, stopped_at=ago)
        )
    await world.serve()
    assert await world.events(1) == [("opened", "down")]

    async def all_missed() -> bool:
        return len(await rows(world.ledger, tables.missed)) == 40

    async with quiet(world):
        await until(all_missed)
    assert [row["kind"] for row in await world.incidents()] == ["down"]


async def test_a_killed_node_is_told_only_if_nobody_continues_its_work(world: World) -> None:
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


async def test_a_run_that_has_succeeded_with_nothing_done_is_told(world: World) -> None:
    make_folder(world.folder, empty=EMPTY)
    await world.serve()
    await world.batch("run", "import", "--queue")
    assert await world.events(1) == [("opened", "empty")]
    assert [row["state"] for row in await rows(world.ledger)] == ["succeeded"]
