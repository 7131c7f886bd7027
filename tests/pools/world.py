"""Pools outside of any engine: tasks in a real file, a real nursery, and attempts whose bodies are
real children.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from batch_system import clock, logs
from batch_system.batch.context.attempt_state import AttemptState
from batch_system.batch.context.lease import Lease
from batch_system.batch.execution.attempt import Attempt
from batch_system.batch.execution.ending import Ending
from batch_system.batch.ledger.run_logs import LogLine
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.states import Origin
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.pools.process_pool import ProcessPool
from batch_system.batch.tasks.discovery import load_tasks
from batch_system.batch.tasks.registry import Task, TaskRegistry
from batch_system.concurrency.thread_pool import ThreadPool
from batch_system.config import Settings
from tests.batch.attempts import SLOT

SECONDS = 30.0

HEAD = """
from __future__ import annotations
import asyncio, ctypes, os, random, signal, subprocess, sys, threading, time
from batch_system import BaseTask, Retry, call_async, current_run, get_db, get_logger, once, start
logger = get_logger("authors")

class _Pooled(BaseTask):
    schedule, pool = None, "cpu"
"""


class Begun:
    """An attempt that was started in a child, and its ending. `lines` are the lines of its log
    until now.
    """

    def __init__(
        self,
        pool: ProcessPool,
        task: Task,
        number: int = 1,
        fence: int = 1,
        id: str | None = None,
        take_over: Callable[[AttemptState], Awaitable[None]] | None = None,
        holds_lease: Callable[[], bool] = lambda: True,
        **params: Any,
    ) -> None:
        now = clock.now()
        claimed = Claimed(
            id or new_id(),
            task.name,
            SLOT,
            Origin.MANUAL,
            params or None,
            number,
            fence,
            now,
            now,
            traceparent=None,
        )
        self.ended: list[Ending] = []
        self.over = asyncio.Event()
        self._taken: list[LogLine] = []
        self.pool = pool
        threads = ThreadPool(1)
        self.attempt = Attempt(
            claimed, task, threads, self._on_end, take_over, holds_lease, child_pool=pool
        )
        self.attempt.start()

    def _on_end(self, _: Attempt, ending: Ending) -> None:
        self.ended.append(ending)
        self.over.set()

    @property
    def log(self) -> list[LogLine]:
        self._taken += self.attempt.state.log.take_lines()
        return self._taken

    @property
    def lines(self) -> list[str]:
        return [line.text for line in self.log]

    async def says(self, words: str) -> str:
        """The first line with this text, once there is one."""
        async with asyncio.timeout(SECONDS):
            while not (found := [line for line in self.lines if words in line]):
                assert not self.over.is_set(), (self.ended, self.lines)
                await asyncio.sleep(0.005)
        return found[0]

    async def ending(self) -> Ending:
        await asyncio.wait_for(self.over.wait(), SECONDS)
        async with asyncio.timeout(SECONDS):
            while self.attempt in self.pool._children:
                await asyncio.sleep(0.005)
        [ending] = self.ended
        return ending

    @property
    def pid(self) -> int:
        pid = self.pool._children[self.attempt].pid
        assert pid is not None
        return pid


class World:
    """A pool with a nursery, and the tasks of its file."""

    def __init__(self, pool: ProcessPool, lease: Lease) -> None:
        self.pool, self.lease = pool, lease

    def begin(self, task: str, **more: Any) -> Begun:
        return Begun(self.pool, TaskRegistry.get(task), **more)

    async def ending_of(self, task: str, **more: Any) -> Ending:
        return await self.begin(task, **more).ending()


def write_tasks(text: str, file: str = "pooled.py") -> None:
    """Write a file of tasks, and load it in this process."""
    Path("tasks", file).write_text(HEAD + text)
    assert load_tasks(Path("tasks")) == []


@asynccontextmanager
async def pool_of(text: str, processes: int = 4, **settings: Any) -> AsyncIterator[World]:
    """A pool that executes the tasks in `text`. Its children use the databases of the test's
    folder.
    """
    write_tasks(text)
    lease = Lease(30)
    lease.renew(clock.boottime())
    pool = ProcessPool(
        "cpu", processes, Settings(**settings), TaskRegistry.tasks(), lease, "node-1"
    )
    pool.start()
    try:
        await asyncio.wait_for(pool.ready(), SECONDS)
        with logs.keep_run_lines():
            yield World(pool, lease)
    finally:
        await pool.stop()


def is_alive(pid: int) -> bool:
    """Whether a process lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until_gone(*pids: int) -> None:
    async with asyncio.timeout(SECONDS):
        while any(map(is_alive, pids)):
            await asyncio.sleep(0.01)


@asynccontextmanager
async def shared_pool(folder: Path, text: str) -> AsyncIterator[tuple[World, dict[str, Task]]]:
    """A pool for many tests, in a folder of its own, and its tasks, which each test has to register
    again.
    """
    (folder / "tasks").mkdir()
    with contextlib.chdir(folder), TaskRegistry.restored():
        TaskRegistry.clear()
        write_tasks(text)
        tasks = TaskRegistry.tasks()
        lease = Lease(3_600)
        lease.renew(clock.boottime())
        pool = ProcessPool("cpu", 4, Settings(TASKS_DIR=folder / "tasks"), tasks, lease, "node-1")
        pool.start()
        await asyncio.wait_for(pool.ready(), SECONDS)
    try:
        yield World(pool, lease), tasks
    finally:
        await pool.stop()
