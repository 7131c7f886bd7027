"""Fixtures for the tests of runs that wait."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from batch_system import TaskRegistry, clock
from batch_system.batch.queue import enqueue
from batch_system.database.engine import Database
from tests.waiting.world import START, Waits


@pytest.fixture(autouse=True)
def still_clock() -> Iterator[None]:
    with clock.moved(START), TaskRegistry.restored():
        yield


@pytest.fixture
async def waits(ledger: Database) -> AsyncIterator[Waits]:
    enqueue.use_service(ledger, lambda: None)
    yield Waits(ledger)
    enqueue.use_no_service()
