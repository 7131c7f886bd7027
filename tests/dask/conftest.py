"""Fixtures for the tests of Dask."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from batch_system.batch.ledger import tables
from batch_system.database.engine import Database
from tests.batch.test_runs import NOW
from tests.dask.world import OF_POOL, Place
from tests.databases import application_with_done


@pytest.fixture
async def place(ledger: Database, tmp_path: Path) -> AsyncIterator[Place]:
    """A folder with tasks, and two databases of each kind, which know the tasks."""
    application = await application_with_done(ledger, tmp_path)
    seen = {
        "first_seen_at": NOW,
        "last_seen_at": NOW,
        "policies": {},
        "description": "",
        "source": "tasks/all.py",
    }
    async with ledger.engine.begin() as connection:
        await connection.execute(
            tables.tasks.insert(), [{"name": name, "pool": "cpu", **seen} for name in OF_POOL]
        )
    with ExitStack() as stack:
        yield Place(tmp_path / "place", ledger, application, stack)
