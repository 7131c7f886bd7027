"""Two files with a task of the same name: which one is used by the commands and by a running
service.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from batch_system import TaskRegistry, logs
from batch_system.batch.tasks.discovery import load_tasks
from batch_system.config import get_settings
from batch_system.operations.asking.context import Loaded
from batch_system.operations.operations import open_operations
from batch_system.server.service import BatchService
from batch_system.verbs.tasks import ListTasks
from tests.batch.ledger_world import refresh
from tests.processes import batch

TASK = """
from batch_system import BaseTask

class {cls}(BaseTask):
    name, schedule = "same", "0 * * * *"
    async def run(self) -> None: ...
"""


def write(name: str) -> None:
    Path(f"tasks/{name}.py").write_text(TASK.format(cls=name.title()))


def loaded() -> Loaded:
    broken = load_tasks(get_settings().TASKS_DIR)
    return Loaded(TaskRegistry.tasks(), broken)


async def listed() -> tuple[list[str], list[str]]:
    """What a command finds: the sources that are used, and the errors of those that are not."""
    with TaskRegistry.restored():
        TaskRegistry.clear()
        async with open_operations(get_settings(), loaded) as operations:
            tasks = (await operations(ListTasks())).tasks
    assert all(task.served_from == "tasks/early.py" for task in tasks if task.error is None)
    return [task.source for task in tasks if task.error is None], [
        task.error for task in tasks if task.error
    ]


def refusal(used: str, other: str) -> str:
    return (
        f"two tasks are named 'same': {used.title()} in tasks/{used}.py is used, "
        f"and {other.title()} in tasks/{other}.py is not; rename one"
    )


async def restarted() -> BatchService:
    TaskRegistry.clear()
    service = BatchService(get_settings())
    await service.start()
    return service


async def has_loaded(service: BatchService, source: str) -> None:
    """The files were looked at twice, and this one is what it runs."""
    for _ in range(2):
        await refresh(service.schedules)
    assert service.tasks["same"].source == source


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A command that lists prints nothing about it, and neither would later code in this
    process.
    """
    yield
    logs.set_up()


@pytest.fixture
async def service() -> AsyncIterator[BatchService]:
    """It has the later one by name, for the other came afterwards."""
    write("later")
    service = await restarted()
    await refresh(service.schedules)
    write("early")
    await has_loaded(service, "tasks/later.py")
    yield service
    await service.stop()


async def test_a_service_keeps_the_file_it_has_and_the_commands_say_so(
    service: BatchService,
) -> None:
    assert [file.error for file in service.broken] == [refusal("later", "early")]
    done = await asyncio.to_thread(batch, Path.cwd(), "tasks")
    assert (done.returncode, done.stdout.split()[-1]) == (1, "tasks/early.py")
    assert done.stderr.splitlines() == [
        "batch: tasks/early.py is not used yet: running services use tasks/later.py for the task "
        "same until they are restarted",
        f"batch: tasks/later.py can't be used: {refusal('early', 'later')}",
    ]


async def test_at_a_start_the_first_by_name_is_used_and_the_commands_agree(
    service: BatchService,
) -> None:
    await service.stop()
    service = await restarted()
    await has_loaded(service, "tasks/early.py")
    assert [file.error for file in service.broken] == [refusal("early", "later")]
    assert await listed() == (["tasks/early.py"], [refusal("early", "later")])
    Path("tasks/early.py").unlink()
    await has_loaded(service, "tasks/early.py")
    assert await listed() == (["tasks/later.py"], [])
    await service.stop()
