"""A task that keeps a writing session open for long on SQLite delays nobody, because the ledger has
a file of its own.

It is kept open for a minute, and all times grow with it, with WRITER_SECONDS=61.
"""

from __future__ import annotations

import asyncio
import os
from datetime import datetime, timedelta

import pytest
from sqlalchemy import text

from batch_system import clock, config, get_db
from batch_system.batch.ledger import tables
from batch_system.config import get_settings
from batch_system.database import engine
from batch_system.server.service import BatchService
from tests.batch.ledger_world import make_task, rows, until

SECONDS = int(os.environ.get("WRITER_SECONDS", "11"))
"""A little more than the longest wait for another process's lock, which is a minute outside of this
test.
"""


async def test_a_long_writing_session_delays_no_slot_heartbeat_or_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "BUSY_GIVE_UP_SECONDS", SECONDS - 1.0)
    monkeypatch.setenv("HEARTBEAT_SECONDS", "1")
    config.forget_settings()
    late: list[timedelta] = []

    async def hold(self: object) -> None:
        async with get_db() as db:
            await db.execute(text("DELETE FROM sessions"))
            await asyncio.sleep(SECONDS)
            await db.commit()

    async def tick(self: object, slot: datetime) -> None:
        late.append(clock.now() - slot)

    async def wait_for_the_lock(self: object) -> None:
        async with get_db() as db:
            await db.execute(text("DELETE FROM users"))
            await db.commit()

    make_task("holder", "* * * * * *", hold)
    make_task("tick", "* * * * * *", tick)
    make_task("writer", "* * * * * *", wait_for_the_lock)
    service = BatchService(get_settings())
    await service.start()
    (held,) = await until(lambda: rows(service.ledger, task="holder", state="running"))
    del late[:]
    (node,) = await rows(service.ledger, tables.nodes)
    await until(lambda: rows(service.ledger, id=held["id"], state="succeeded"), SECONDS + 15)
    # Work that waited for the writer would have waited for nearly all of these seconds.
    assert len(late) >= SECONDS / 2
    assert max(late) < timedelta(seconds=SECONDS / 2)
    (beaten,) = await rows(service.ledger, tables.nodes)
    assert beaten["beats"] - node["beats"] >= SECONDS / 2
    # The one that writes to the same file waited for its turn, and then got it.
    await until(lambda: rows(service.ledger, task="writer", state="succeeded"))
    assert await rows(service.ledger, task="writer", state="failed") == []
    await service.stop()
