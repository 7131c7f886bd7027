"""The world of the stories, on both databases."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from batch_system.database.engine import Database
from tests.incidents.receivers import http_receiver
from tests.incidents.world import FAILS, WAITS, World
from tests.server.test_serve import make_folder


@pytest.fixture
async def world(ledger: Database, ledger_url: str, tmp_path: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        receiver = await stack.enter_async_context(http_receiver())
        folder = make_folder(tmp_path, load=FAILS, wait=WAITS)
        yield World(folder, ledger, ledger_url, receiver, stack)
