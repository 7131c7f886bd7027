"""A night that begins at START, with a watch over its ledger."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from batch_system import clock
from batch_system.database.engine import Database
from tests.incidents.watching import Watching, watching

START = datetime(2026, 3, 10, 2, 0, 0, tzinfo=UTC)


@pytest.fixture
async def watch(ledger: Database) -> AsyncIterator[Watching]:
    with clock.moved(START):
        async with watching(ledger, ledger) as node:
            yield node
