"""The databases of the stories: a server of its own for each story on PostgreSQL, files for each on
SQLite.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from batch_system.testing.databases import wait_for
from batch_system.testing.postgres import OwnServer, find_binaries
from tests.days.story import TWELVE, Story

LONGEST = (
    *(
        "gone_for_five_minutes",
        "disk_is_full[300",
        "frozen_for_three_minutes",
        "the_lock_of_the_ledger_for_45_seconds",
    ),
    *(
        "renames",
        "half_open_for_three_minutes",
        "memory_of_the_service",
        "scheduler_is_killed",
        "renamed",
        "every_20",
    ),
)
"""Words in the names of the stories that last longest, which begin first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deal the stories to the workers of xdist, each of which takes its share from the front of
    what is collected.
    """

    def place(item: pytest.Item) -> int:
        return next(
            (place for place, words in enumerate(LONGEST) if words in item.name), len(LONGEST)
        )

    stories = sorted((item for item in items if item.get_closest_marker("days")), key=place)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    others = [item for item in items if item not in stories]
    items[:] = [*others, *(item for worker in range(workers) for item in stories[worker::workers])]


@pytest.fixture
def server() -> Iterator[OwnServer]:
    with OwnServer(find_binaries(), fast=True) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The settings of a story that is told on both databases. On SQLite they are the default
    ones.
    """
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
