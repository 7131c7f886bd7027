"""How a run in a child ends: by itself, by a crash, by its limits, or because it is stopped. The
reason is always right.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from batch_system.batch.context.lease import LOST
from batch_system.batch.execution import attempt
from batch_system.batch.execution.fingerprint import fingerprint_of
from batch_system.batch.ledger.states import RunState
from batch_system.batch.pools import child as parents_child
from batch_system.batch.pools.exit_reasons import memory_error
from batch_system.batch.tasks.registry import Task
from tests.batch.ledger_world import until
from tests.pools.world import Begun, World, pool_of, shared_pool, until_gone
from tests.processes import suspend

CRASHES = """
class Crash(_Pooled):
    name = "crash"
    def run(self, how: str) -> object:
        logger.info("begins")
        if how == "segfault":
            ctypes.string_at(0)
        elif how == "exit":
            os._exit(3)
        elif how == "abort":
            os.abort()
        elif how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "raises":
            raise ValueError("no good")
        elif how == "SystemExit":
            raise SystemExit(7)
        return {"done": how}

class CrashAgain(Crash):
    name, retry = "crash_again", Retry(attempts=2, wait=5, jitter=0)

class CrashOther(Crash):
    name, retry = "crash_other", Retry(attempts=2, on=(ValueError,))
"""

REASONS = {
    "segfault": "killed by signal 11 (SIGSEGV)",
    "exit": "exited with status 3 before run() had ended",
    "abort": "killed by signal 6 (SIGABRT)",
    "killed": "killed by signal 9 (SIGKILL)",
    "raises": "ValueError: no good",
    "SystemExit": "SystemExit: 7",
}


MEMORY = """
def use(size: int) -> int:
    return len(bytearray(size))

class Small(_Pooled):
    name, memory = "small", "64 MiB"
    def run(self, size: int, elsewhere: bool = False) -> int:
        if elsewhere:
            code = f"held = bytearray(b'x') * {size}; import time; time.sleep(60)"
            return subprocess.run([sys.executable, "-c", code]).returncode
        return use(size)

class Free(_Pooled):
    name = "free"
    def run(self, size: int) -> int:
        return use(size)
"""

HANGS = """
import re

class Hang(_Pooled):
    name, timeout = "hang", 600
    def run(self, mark: str) -> None:
        open(mark, "w").close()
        re.match(r"(a+)+$", "a" * 60 + "b")  # in C, and no other thread of the process gets on

class AsyncHang(_Pooled):
    name, timeout = "async_hang", 600
    async def run(self, mark: str = os.devnull) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        logger.info(f"pid {os.getpid()} {subprocess.Popen(['sleep', '600']).pid}")
        open(mark, "w").close()
        while True:
            pass

class Quick(_Pooled):
    name, timeout = "quick", 2
    def run(self) -> int:
        return 1

class Waits(_Pooled):
    name = "waits"
    async def run(self, asks: bool = False) -> str:
        logger.info("waits")
        try:
            while True:
                await asyncio.sleep(0.01)
                if asks:
                    current_run().checkpoint()
        except asyncio.CancelledError:
            if asks:
                raise
            return "it ended in spite of the cancel"

class CleansUp(_Pooled):
    name = "cleans_up"
    async def run(self) -> None:
        logger.info("waits")
        try:
            await asyncio.sleep(600)
        finally:
            await asyncio.sleep(0.3)
            logger.info("is clean")

class Once(_Pooled):
    name, rerun = "once", False
    def run(self) -> None:
        logger.info("waits")
        time.sleep(600)
"""

TASKS = CRASHES + MEMORY + HANGS


@pytest.fixture(scope="module")
async def shared(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[tuple[World, dict[str, Task]]]:
    """One nursery for the tests of this file."""
    async with shared_pool(tmp_path_factory.mktemp("pool"), TASKS) as shared:
        yield shared


async def test_a_run_whose_process_ends_fails_with_the_true_reason_and_the_policy_for_errors(
    world: World,
) -> None:
    for how, reason in REASONS.items():
        ended = await world.ending_of("crash", how=how)
        assert (ended.state, ended.outcome, ended.reason) == (RunState.FAILED, "failed", reason)
        assert ended.fingerprint is not None and ended.fingerprint.startswith("1:")
    assert (await world.ending_of("crash", how="not")).result == {"done": "not"}
    again = await world.ending_of("crash_again", how="segfault")
    assert (again.state, again.wait) == (RunState.RETRYING, 5)
    assert (await world.ending_of("crash_again", how="segfault", number=2)).state == RunState.FAILED
    assert (await world.ending_of("crash_other", how="segfault")).state == RunState.FAILED
    assert (await world.ending_of("crash_other", how="raises")).state == RunState.RETRYING


async def test_the_error_of_a_child_has_its_class_its_message_and_the_authors_traceback(
    world: World,
) -> None:
    from batch_system import failures

    begun = world.begin("crash", how="raises")
    error = (await begun.ending()).error
    assert error is not None
    facts = failures.facts_of(error)
    assert (facts["type"], facts["message"]) == ("ValueError", "no good")
    assert (
        'raise ValueError("no good")' in facts["traceback"] and "service/" not in facts["traceback"]
    )
    assert begun.lines[-1] == f"crash failed: ValueError: no good\n{facts['traceback']}"


async def test_a_sigkill_of_the_kernel_is_reported_as_such(
    monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    counted = iter(range(10**9, 2 * 10**9))
    monkeypatch.setattr("batch_system.batch.pools.process_pool.kernel_kills", lambda: next(counted))
    ended = await world.ending_of("crash", how="killed")
    assert ended.reason == "killed by the kernel, because the machine ran out of memory"


async def test_a_run_that_uses_more_than_its_memory_fails_and_others_do_not(world: World) -> None:
    ended = await world.ending_of("small", size=400_000_000)
    assert (ended.state, ended.reason) == (RunState.FAILED, "used more than 64 MiB")
    assert type(ended.error).__name__ == "MemoryExceeded"
    assert ended.fingerprint == fingerprint_of(memory_error(64 * 1024**2)), "wherever it is noticed"
    assert (await world.ending_of("free", size=400_000_000)).result == 400_000_000
    assert (await world.ending_of("small", size=20_000_000)).result == 20_000_000


async def test_memory_of_processes_that_a_run_has_started_counts(world: World) -> None:
    begun = world.begin("small", size=100_000_000, elsewhere=True)
    assert (await begun.ending()).reason == "used more than 64 MiB"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "ABANDON_SECONDS", 0.2)


@pytest.mark.parametrize("task", ["hang", "async_hang"])
async def test_a_run_that_does_not_stop_is_killed_with_all_its_processes(
    impatient: None, task: str, world: World, tmp_path: Path
) -> None:
    """Its timeout comes when its code hangs, however long its start takes."""
    mark = tmp_path / "hangs"
    begun = world.begin(task, mark=str(mark))
    await until(lambda: asyncio.sleep(0, mark.exists()))
    pids = (
        [int(word) for word in (await begun.says("pid")).split()[1:]]
        if task == "async_hang"
        else []
    )
    [timer] = begun.attempt._timers
    timer._run()
    ended = await begun.ending()
    assert (ended.state, ended.outcome, ended.reason) == (
        RunState.FAILED,
        "timed out",
        "timed out after 600 s",
    )
    assert world.pool.running == 0
    await until_gone(*pids)
    [line] = [line for line in begun.lines if "timed out" in line]
    assert line == f"{task} failed: timed out after 600 s\nTimeoutError: timed out after 600 s"


@pytest.mark.rest
async def test_a_timeout_counts_from_the_begin_of_the_run_and_not_from_that_of_its_process(
    world: World,
) -> None:
    nursery = world.pool.nursery_pid
    assert nursery is not None
    suspend(nursery)
    begun = world.begin("quick")
    timeout_is_over = asyncio.get_running_loop().time() + 2.1
    await until(lambda: asyncio.sleep(0, asyncio.get_running_loop().time() > timeout_is_over))
    os.kill(nursery, signal.SIGCONT)
    ended = await begun.ending()
    assert (ended.state, ended.result) == (RunState.SUCCEEDED, 1)


async def test_a_stop_reaches_the_code_and_ends_it_before_it_is_killed(world: World) -> None:
    begun = world.begin("waits", asks=True)
    await begun.says("waits")
    begun.attempt.pause("a person has paused it")
    ended = await begun.ending()
    assert (ended.state, ended.reason) == (RunState.INTERRUPTED, "a person has paused it")

    begun = world.begin("waits", asks=True)
    await begun.says("waits")
    begun.attempt.cancel("a person did not want it")
    ended = await begun.ending()
    assert (ended.state, ended.reason) == (RunState.CANCELLED, "a person did not want it")
    assert [line for line in begun.lines if "cancelled" in line] == [
        "waits was cancelled: a person did not want it"
    ]


async def test_a_run_that_ends_in_spite_of_an_interrupt_has_succeeded_but_not_after_a_cancel(
    world: World,
) -> None:
    for stop, state in (("interrupt", RunState.SUCCEEDED), ("cancel", RunState.CANCELLED)):
        begun = world.begin("waits")
        await begun.says("waits")
        getattr(begun.attempt, stop)("the service stopped")
        assert (await begun.ending()).state == state


async def test_a_run_that_is_cancelled_may_clean_up(world: World) -> None:
    begun = world.begin("cleans_up")
    await begun.says("waits")
    begun.attempt.cancel("cancelled by ann")
    assert (await begun.ending()).state == RunState.CANCELLED
    assert "is clean" in begun.lines


async def test_a_run_that_is_given_up_or_abandoned_is_killed_at_once(world: World) -> None:
    begun = world.begin("async_hang")
    pids = [int(word) for word in (await begun.says("pid")).split()[1:]]
    begun.attempt.give_up(LOST)
    assert begun.ended[0].reason == LOST
    await asyncio.wait_for(until_gone(*pids), attempt.ABANDON_SECONDS / 2)
    await begun.ending()

    begun = world.begin("once")
    await begun.says("waits")
    pid = begun.pid
    begun.attempt.interrupt("the service stopped")
    begun.attempt.abandon()
    await asyncio.wait_for(until_gone(pid), attempt.ABANDON_SECONDS / 2)
    ended = await begun.ending()
    assert ended.state == RunState.FAILED and "the service stopped" in (ended.reason or "")


async def test_a_cancel_in_each_phase_leaves_nothing(
    impatient: None, monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    for turns in (*range(12), 20, 40, 80, 160):
        begun = world.begin("waits", asks=True)
        for _ in range(turns):
            await asyncio.sleep(0)
        begun.attempt.cancel("not wanted")
        assert (await begun.ending()).state == RunState.CANCELLED
    for milliseconds in range(0, 30, 3):
        begun = world.begin("once")
        await asyncio.sleep(milliseconds / 1000)
        begun.attempt.cancel("not wanted")
        assert (await begun.ending()).state == RunState.CANCELLED
    assert world.pool.running == 0
    assert children_of(world) == []


def children_of(world: World) -> list[int]:
    pid = world.pool.nursery_pid
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.rest
async def test_a_child_that_hangs_after_its_end_is_killed_and_its_ending_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parents_child, "EXIT_SECONDS", 0.2)
    text = """
from batch_system.database.engine import Database

class Stays(_Pooled):
    name = "stays"
    async def run(self) -> str:
        # A child closes its connections after it has told its end.
        Database.dispose = lambda self: time.sleep(600)
        current_run().progress(1, 2)
        return "done"
"""
    async with pool_of(text) as world:
        ended = await world.ending_of("stays")
        assert (ended.state, ended.result) == (RunState.SUCCEEDED, "done")


@pytest.mark.rest
async def test_a_child_that_sends_something_else_than_frames_is_killed() -> None:
    text = """
import socket

class Liar(_Pooled):
    name = "liar"
    def run(self, text: str) -> None:
        for name in os.listdir("/proc/self/fd"):
            try:
                if "socket" in os.readlink(f"/proc/self/fd/{name}"):
                    os.write(int(name), bytes.fromhex(text))
            except OSError:
                pass
        time.sleep(600)
"""
    lies = (
        b"\xff\xff\xff\xff",
        b"\0\0\0\2[]",
        b"\0\0\0\2{}",
        b'\0\0\0\x0e{"lines":[1,2]}'[:18],
        b"\0\0\0\x01x",
    )
    async with pool_of(text) as world:
        for lie in lies:
            ended = await world.ending_of("liar", text=lie.hex())
            assert "can't be read" in (ended.reason or ""), lie


@pytest.mark.rest
async def test_the_last_output_of_a_killed_child_is_kept() -> None:
    text = """
class Last(_Pooled):
    name = "last"
    def run(self) -> None:
        os.write(2, b"the last words, without an end of line")
        os.kill(os.getpid(), signal.SIGSEGV)
"""
    async with pool_of(text) as world:
        begun: Begun = world.begin("last")
        await begun.ending()
        assert begun.lines[0] == "the last words, without an end of line"
