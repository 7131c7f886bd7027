"""The databases of the stories: a server of its own for each story on PostgreSQL, files for each on SQLite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.testing.databases import wait_for
from service.testing.postgres import OwnServer, find_binaries
from tests.days.story import TWELVE, Story


@pytest.fixture
def server() -> Iterator[OwnServer]:
    with OwnServer(find_binaries(), fast=True) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The settings of a story that is told on both databases. On SQLite they are the default ones."""
    if request.param == "sqlite":
        yield {}
        return
    with OwnServer(find_binaries(), fast=True) as server:
        yield {"DATABASE_URL": wait_for(server.create_database())}


@pytest.fixture
def tasks() -> str:
    """The file of tasks. A module whose tasks are others overrides this."""
    return TWELVE


@pytest.fixture
def story(settings: dict[str, str], tasks: str, tmp_path: Path) -> Iterator[Story]:
    with Story(tmp_path / "story", settings, tasks) as story:
        yield story
