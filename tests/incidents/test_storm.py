"""Many failures and many services at once: each failure is noticed once, in bounded memory and few
messages.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, insert, select

from batch_system import clock
from batch_system.batch.ledger import tables
from batch_system.batch.ledger.tables import new_id
from batch_system.database.engine import Database
from tests.batch.ledger_world import rows, until
from tests.incidents.world import World
from tests.processes import Service
from tests.server.test_serve import make_folder

pytestmark = pytest.mark.nightly

FAILURES, TASKS, ERRORS = 100_000, 200, 500
MOST_MEGABYTES = 150
MOST_MESSAGES = 60
EACH_SECOND = """
from batch_system import BaseTask

class Tick(BaseTask):
    name, schedule, overlap = "tick", "* * * * * *", "allow"

    async def run(self) -> None: ...
"""


async def fail_at_once(ledger: Database) -> None:
    """Runs of many tasks that have failed with many errors, of which none was noticed yet."""
    now = clock.now()
    common = {
        "origin": "manual",
        "state": "failed",
        "rank": 0,
        "catch_up": False,
        "attempt": 1,
        "fence": 1,
        "due_at": now,
        "created_at": now,
        "finished_at": now,
        "reason": "ConnectionError: the shop is down",
    }
    for first in range(0, FAILURES, 5_000):
        made = [
            {
                **common,
                "id": new_id(),
                "task": f"load{n % TASKS}",
                "fingerprint": f"1:{n % ERRORS:012x}",
            }
            for n in range(first, first + 5_000)
        ]
        async with ledger.engine.begin() as connection:
            await connection.execute(insert(tables.runs), made)


def megabytes(service: Service) -> float:
    """The memory of a process now."""
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


async def unnoticed(ledger: Database) -> int:
    waiting = (
        select(func.count()).select_from(tables.runs).where(tables.runs.c.noticed_at.is_(None))
    )
    async with ledger.engine.connect() as connection:
        return int(
            (await connection.execute(waiting.where(tables.runs.c.state == "failed"))).scalar_one()
        )


async def test_a_storm_of_failures_takes_bounded_memory_and_messages_and_slots_go_on(
    world: World,
) -> None:
    make_folder(world.folder, tick=EACH_SECOND)
    service = await world.serve()
    await until(world.has_watch)
    await asyncio.sleep(3)
    before, began = megabytes(service), clock.now()
    await fail_at_once(world.ledger)
    written, peak = clock.now(), before

    async def is_noticed() -> bool:
        nonlocal peak
        peak = max(peak, megabytes(service))
        await asyncio.sleep(0.1)
        return not await unnoticed(world.ledger)

    await until(is_noticed, 300)
    noticed = clock.now()
    await asyncio.sleep(25)  # the messages of the twenty seconds after the first one
    incidents = await world.incidents()
    assert sum(row["count"] for row in incidents if row["kind"] == "failed") == FAILURES
    assert len(incidents) <= TASKS * 51
    assert peak - before < MOST_MEGABYTES
    assert len(world.receiver.requests) <= MOST_MESSAGES
    ticks = [row for row in await rows(world.ledger, task="tick") if began < row["slot"] < noticed]
    assert [row["state"] for row in ticks] == ["succeeded"] * len(ticks)
    assert await rows(world.ledger, tables.missed) == []
    late = sorted((row["started_at"] - row["slot"]) / timedelta(seconds=1) for row in ticks)
    print(
        f"\n{world.ledger.kind}: {FAILURES:,} failures written in "
        f"{(written - began).total_seconds():.1f} s, noticed "
        f"{(noticed - written).total_seconds():.1f} s later; {len(incidents):,} incidents, "
        f"{len(world.receiver.requests)} messages; memory {before:.0f} MB, at most {peak:.0f} MB; "
        f"{len(ticks)} slots meanwhile, started {late[len(late) // 2]:.3f} s (p50) and "
        f"{late[-1]:.3f} s (most) late"
    )


async def test_eight_services_notice_each_failure_once(world: World) -> None:
    for _ in range(8):
        await world.serve()
    number = 40
    for _ in range(number):
        await world.batch("run", "load", "--queue")

    async def all_failed() -> bool:
        return len(await rows(world.ledger, state="failed")) == number and not await unnoticed(
            world.ledger
        )

    await until(all_failed, 120)
    await asyncio.sleep(3)
    (incident,) = await world.incidents()
    assert (incident["kind"], incident["count"]) == ("failed", number)
    assert await world.events(1) == [("opened", "failed")]
    assert len(world.receiver.requests) == 1
