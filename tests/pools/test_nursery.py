"""Nurseries: one that is killed, one that can't start, new tasks, threads that imports leave, and
the service's end.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from batch_system import BaseTask, TaskRegistry
from batch_system.batch.ledger.states import RunState
from batch_system.batch.pools import child
from batch_system.batch.pools import nursery as nurseries
from batch_system.batch.pools.nursery import Nursery
from batch_system.batch.pools.process_pool import ProcessPool
from batch_system.config import Settings
from tests.batch.ledger_world import until
from tests.pools.world import Begun, pool_of, until_gone, write_tasks
from tests.processes import ROOT, suspend

TASKS = """
class Pid(_Pooled):
    name = "pid"
    def run(self) -> int:
        logger.info("begins")
        return os.getpid()

class Sleeps(_Pooled):
    name = "sleeps"
    def run(self) -> None:
        logger.info(f"pid {os.getpid()}")
        time.sleep(600)
"""

WAITS = """
class Waits(_Pooled):
    name = "waits"
    def run(self) -> str:
        logger.info("waits")
        while not os.path.exists("go on"):
            time.sleep(0.02)
        return "done"
"""


@pytest.mark.rest
async def test_the_runs_of_a_nursery_that_is_killed_are_interrupted_and_a_new_one_serves() -> None:
    async with pool_of(TASKS) as world:
        begun = [world.begin("sleeps") for _ in range(2)]
        pids = [int((await one.says("pid")).split()[1]) for one in begun]
        nursery = world.pool.nursery_pid
        assert nursery is not None
        os.kill(nursery, signal.SIGKILL)
        for one in begun:
            ended = await one.ending()
            assert ended.state == RunState.INTERRUPTED
            assert ended.reason == "its parent process (the nursery of pool cpu) was killed"
        await until_gone(nursery, *pids)
        assert isinstance((await world.ending_of("pid")).result, int)
        assert world.pool.nursery_pid not in (None, nursery)


@pytest.mark.rest
async def test_a_child_is_killed_also_where_its_nursery_does_not_react(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nurseries, "KILL_SECONDS", 0.2)
    async with pool_of(TASKS) as world:
        begun = world.begin("sleeps")
        pid = int((await begun.says("pid")).split()[1])
        nursery = world.pool.nursery_pid
        assert nursery is not None
        suspend(nursery)
        begun.attempt.give_up("the lease is over")
        await begun.ending()
        await until_gone(nursery, pid)
        assert isinstance((await world.ending_of("pid")).result, int)


@pytest.mark.rest
@pytest.mark.parametrize("what", ["begins", "dies", "ends"])
async def test_a_nursery_that_does_not_answer_for_a_lease_is_replaced_and_holds_no_run(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run whose child has begun, died, and reported how it ended. Only the nursery knows what
    became of the process.
    """
    monkeypatch.setattr(child, "EXIT_SECONDS", 0.2)
    monkeypatch.setattr(nurseries, "KILL_SECONDS", 1)
    async with pool_of(TASKS + WAITS, LEASE_SECONDS=1, HEARTBEAT_SECONDS=0.3) as world:
        begun, nursery = world.begin("waits"), world.pool.nursery_pid
        await begun.says("waits")
        assert nursery is not None
        suspend(nursery)
        if what == "begins":
            begun = world.begin("pid")
        elif what == "dies":
            os.kill(begun.pid, signal.SIGKILL)
        else:
            Path("go on").touch()
        ended = await begun.ending()
        said = "(the nursery of pool cpu) did not answer for 1 s, and was killed"
        if what == "ends":
            assert (ended.state, ended.result) == (RunState.SUCCEEDED, "done")
        else:
            assert (ended.state, ended.reason) == (
                RunState.INTERRUPTED,
                f"its parent process {said}",
            )
        await until_gone(nursery)
        assert isinstance((await world.ending_of("pid")).result, int)
    assert (
        "the nursery of pool cpu did not answer for 1 s, and was killed; a new one is started"
        in caplog.text
    )


@pytest.mark.rest
async def test_a_nursery_ends_also_if_a_child_could_get_no_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async with pool_of(TASKS) as world:
        nursery = world.pool.nursery_pid
        assert nursery is not None
        with monkeypatch.context() as patch:
            patch.setattr(os, "pipe", refuse)
            assert (
                await world.ending_of("pid")
            ).reason == "OSError: [Errno 24] Too many open files"
        world.pool.renew()
        await until_gone(nursery)
        assert isinstance((await world.ending_of("pid")).result, int)


@pytest.mark.rest
async def test_processes_that_a_child_has_started_do_not_outlive_its_nursery() -> None:
    text = TASKS.replace("time.sleep(600)", "subprocess.run(['sleep', '600'])")
    text = text.replace('f"pid {os.getpid()}"', "f\"pid {subprocess.Popen(['sleep', '600']).pid}\"")
    async with pool_of(text) as world:
        begun = world.begin("sleeps")
        pid = int((await begun.says("pid")).split()[1])
        assert world.pool.nursery_pid is not None
        os.kill(world.pool.nursery_pid, signal.SIGKILL)
        await begun.ending()
        await until_gone(pid)


@pytest.mark.rest
async def test_children_die_with_a_service_that_is_killed(tmp_path: Path) -> None:
    write_tasks(TASKS)
    code = f"""
import asyncio, sys
sys.path.insert(0, {str(ROOT)!r})
from batch_system import TaskRegistry
from tests.pools.world import Begun, ProcessPool, Settings, load_tasks, logs, Path

async def main():
    load_tasks(Path("tasks"))
    pool = ProcessPool("cpu", 2, Settings(), TaskRegistry.tasks())
    pool.start()
    with logs.keep_run_lines():
        begun = Begun(pool, TaskRegistry.get("sleeps"))
        print((await begun.says("pid")).split()[1], pool.nursery_pid, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""
    service = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert service.stdout is not None
    with service:
        pids = [int(word) for word in (await asyncio.to_thread(service.stdout.readline)).split()]
        assert len(pids) == 2
        service.kill()
        await until_gone(*pids)


@pytest.mark.rest
async def test_where_imports_leave_threads_each_run_gets_a_process_of_its_own() -> None:
    text = "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n" + TASKS
    async with pool_of(text, processes=2) as world:
        assert not world.pool._forks
        pids = set()
        for _ in range(3):
            spare = world.pool.nursery_pid
            ended = await world.ending_of("pid")
            assert ended.result == spare or spare is None
            pids.add(ended.result)
        assert len(pids) == 3
        begun = world.begin("sleeps")
        await begun.says("pid")
        pid = begun.pid
        begun.attempt.give_up("the lease is over")
        await begun.ending()
        await until_gone(pid)
        crashed = world.begin("sleeps")
        await crashed.says("pid")
        os.kill(crashed.pid, signal.SIGSEGV)
        ended = await crashed.ending()
        assert ended.reason == "killed by signal 11 (SIGSEGV)"
        await world.pool.ready()
        last = world.pool.nursery_pid
        assert last is not None
    await until_gone(last)


@pytest.mark.rest
async def test_a_file_that_comes_later_is_served_by_a_new_nursery_and_the_old_one_ends() -> None:
    async with pool_of(TASKS) as world:
        sleeping = world.begin("sleeps")
        await sleeping.says("pid")
        first = world.pool.nursery_pid
        assert first is not None
        write_tasks(
            TASKS.replace('"pid"', '"late"').replace('"sleeps"', '"late_sleeps"'), "later.py"
        )
        world.pool._tasks = TaskRegistry.tasks()
        assert isinstance((await world.ending_of("late")).result, int)  # also without renew()
        second = world.pool.nursery_pid
        assert second not in (None, first) and not sleeping.over.is_set()
        world.pool.renew()
        while world.pool.nursery_pid == second:
            assert world.pool.free == 3
            await asyncio.sleep(0.01)
        sleeping.attempt.give_up("it is enough")
        await sleeping.ending()
        await until_gone(first)


async def test_a_nursery_that_can_not_start_is_logged_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_tasks(TASKS)
    monkeypatch.setattr("batch_system.batch.pools.process_pool.FIRST_PAUSE", 0.01)
    pool = ProcessPool("cpu", 2, Settings(), TaskRegistry.tasks())
    good = sys.executable
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    start, tries = Nursery.start, 0

    async def counted(self: Nursery) -> None:
        nonlocal tries
        tries += 1
        await start(self)

    monkeypatch.setattr(Nursery, "start", counted)
    pool.start()
    try:
        await until(lambda: asyncio.sleep(0, tries > 2))
        assert pool.free == 0
        assert [r.message for r in caplog.records if "can't start" in r.message] == [
            "pool cpu executes no runs here, because its nursery can't start: no process could be "
            "started by the interpreter /nowhere/python: [Errno 2] No such file or directory: "
            "'/nowhere/python'"
        ]
        waiting = Begun(pool, TaskRegistry.get("pid"))
        gone = Begun(pool, TaskRegistry.get("pid"))
        await asyncio.sleep(0)
        gone.attempt.cancel("not wanted")
        assert (await gone.ending()).state == RunState.CANCELLED
        monkeypatch.setattr(sys, "executable", good)
        assert isinstance((await waiting.ending()).result, int)
        assert pool.free == 2
    finally:
        await pool.stop()


async def test_an_import_that_ends_the_nursery_is_reported() -> None:
    write_tasks(TASKS)
    Path("tasks/ends.py").write_text("import os\nos._exit(5)\n")
    pool = ProcessPool("cpu", 2, Settings(), TaskRegistry.tasks())
    pool.start()
    try:
        while pool._trouble is None:
            await asyncio.sleep(0.01)
        assert pool._trouble == "its process ended with status 5 while it imported the tasks"
        assert pool.free == 0
    finally:
        await pool.stop()


@pytest.mark.rest
async def test_a_task_that_the_nursery_can_not_import_fails_with_that_reason() -> None:
    class Local(BaseTask):
        name, schedule, pool = "local", None, "cpu"

        def run(self) -> None: ...

    TaskRegistry.register(Local)
    async with pool_of(TASKS) as world:
        ended = await world.ending_of("local")
        assert ended.state == RunState.FAILED
        assert "the nursery of pool cpu does not have the task local: " in (ended.reason or "")
        assert "can't be imported there" in (ended.reason or "")
        assert world.pool.free == 4


async def test_a_task_that_was_registered_by_hand_is_imported_by_the_name_of_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "by_hand_module.py").write_text(
        "from batch_system import BaseTask\n\nclass Hand(BaseTask):\n"
        "    name, schedule, pool = 'hand', None, 'cpu'\n    def run(self):\n        return 'by "
        "hand'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    TaskRegistry.register(importlib.import_module("by_hand_module").Hand)
    async with pool_of(TASKS) as world:
        assert (await world.ending_of("hand")).result == "by hand"


async def counts(pool: ProcessPool) -> tuple[int, int, int]:
    """The children and zombies of the nursery, its open files, and those of this process."""
    gc.collect()  # of what earlier tests have left
    await asyncio.sleep(0.05)
    pid = pool.nursery_pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return len(children), len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir("/proc/self/fd"))


@pytest.mark.rest
@pytest.mark.parametrize("number", [100, pytest.param(1_000, marks=pytest.mark.nightly)])
async def test_nothing_is_left_of_many_runs(number: int) -> None:
    async with pool_of(TASKS) as world:

        async def some(runs: int) -> None:
            for _ in range(runs):
                ended = await world.ending_of("pid")
                assert ended.state == RunState.SUCCEEDED
                await until_gone(ended.result)

        await asyncio.gather(*(some(5) for _ in range(4)))
        before, tasks = await counts(world.pool), len(asyncio.all_tasks())
        await asyncio.gather(*(some(number // 4) for _ in range(4)))
        assert await counts(world.pool) == before and before[0] == 0
        assert len(asyncio.all_tasks()) == tasks
