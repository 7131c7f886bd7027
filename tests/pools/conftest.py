"""Fixtures for the tests of pools."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from batch_system import TaskRegistry, logs
from batch_system.batch.tasks.registry import Task
from tests.pools.world import World


@pytest.fixture
def world(shared: tuple[World, dict[str, Task]]) -> Iterator[World]:
    """The nursery of the test's file, with its tasks. `shared`: see world.shared_pool; each file
    has its own.
    """
    for task in shared[1].values():
        TaskRegistry.register(task.cls)
    with logs.keep_run_lines():
        yield shared[0]
