from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest

from batch_system.concurrency.thread_pool import ThreadPool

SECONDS = 5.0
colour: ContextVar[str] = ContextVar("colour", default="none")


@pytest.fixture
def opened() -> Iterator[threading.Event]:
    """The event that hung calls wait for. It is set at the end of the test."""
    event = threading.Event()
    yield event
    event.set()


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not is_so():
            await asyncio.sleep(0.001)


async def hang(
    threads: ThreadPool, opened: threading.Event, number: int = 1
) -> list[asyncio.Task[Any]]:
    """Start this number of calls that hang, and wait until each has begun in a thread."""
    begun = threading.Semaphore(0)

    def wait() -> None:
        begun.release()
        opened.wait()

    tasks = [asyncio.create_task(threads.run(wait)) for _ in range(number)]
    for _ in range(number):
        assert await asyncio.to_thread(begun.acquire, timeout=SECONDS)
    return tasks


async def give_up(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def raising(error: BaseException) -> None:
    raise error


async def test_a_call_runs_in_a_daemon_thread_of_our_own() -> None:
    thread = await ThreadPool(1).run(threading.current_thread)
    assert thread.daemon and thread.name.startswith("batch-run-")


async def test_a_call_sees_its_callers_context_and_changes_none() -> None:
    def change() -> str:
        before = colour.get()
        colour.set("changed inside")
        return before

    threads = ThreadPool(1)
    colour.set("outside")
    assert [await threads.run(change), await threads.run(change)] == ["outside", "outside"]
    assert colour.get() == "outside"


async def test_threads_are_used_again() -> None:
    threads = ThreadPool(8)
    names = set()
    for _ in range(20):
        names.add((await threads.run(threading.current_thread)).name)
        # A thread delivers the result first, and is free a moment later.
        await until(lambda: threads.free == 8)
    assert len(names) == 1


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        asyncio.CancelledError(),
    ],
)
async def test_an_error_of_a_call_is_raised_and_its_thread_goes_on(error: BaseException) -> None:
    threads = ThreadPool(1)
    with pytest.raises(type(error)):
        await threads.run(raising, error)
    await until(lambda: threads.free == 1)
    assert await threads.run(lambda: "next") == "next"


async def test_a_stop_iteration_is_raised_as_a_runtime_error_with_its_cause() -> None:
    with pytest.raises(RuntimeError, match=r"run\(\) raised StopIteration\(7\)") as caught:
        await ThreadPool(1).run(raising, StopIteration(7))
    assert isinstance(caught.value.__cause__, StopIteration)


async def test_no_more_calls_than_the_limit_run_at_once_and_the_rest_wait(
    opened: threading.Event,
) -> None:
    threads = ThreadPool(2)
    hanging = await hang(threads, opened, 2)
    waiting = [asyncio.create_task(threads.run(threading.get_ident)) for _ in range(5)]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in waiting) and threads.free == 0
    opened.set()
    assert len(set(await asyncio.wait_for(asyncio.gather(*waiting), SECONDS))) <= 2
    await asyncio.gather(*hanging)
    await until(lambda: threads.free == 2)


async def test_a_call_that_waited_and_was_cancelled_never_runs(opened: threading.Event) -> None:
    threads, ran = ThreadPool(1), threading.Event()
    hanging = await hang(threads, opened)
    waiting = asyncio.create_task(threads.run(ran.set))
    await asyncio.sleep(0)
    await give_up([waiting])
    opened.set()
    await asyncio.gather(*hanging)
    assert await threads.run(lambda: "next") == "next"
    assert not ran.is_set()
    await until(lambda: threads.free == 1)


async def test_a_hung_thread_is_replaced(opened: threading.Event) -> None:
    threads = ThreadPool(1)
    hanging = await hang(threads, opened)
    assert threads.free == 0
    await give_up(hanging)
    assert threads.free == 1
    assert await asyncio.wait_for(threads.run(lambda: "next"), SECONDS) == "next"


async def test_a_call_that_waits_behind_a_hung_one_runs_when_that_is_abandoned(
    opened: threading.Event,
) -> None:
    threads = ThreadPool(1)
    hanging = await hang(threads, opened)
    waiting = asyncio.create_task(threads.run(lambda: "next"))
    await asyncio.sleep(0)
    await give_up(hanging)
    assert await asyncio.wait_for(waiting, SECONDS) == "next"


async def test_hung_threads_are_replaced_up_to_a_bound(opened: threading.Event) -> None:
    threads = ThreadPool(2)
    await give_up(await hang(threads, opened, 2))
    assert threads.free == 2
    await give_up(await hang(threads, opened, 2))
    assert threads.free == 0
    opened.set()
    await until(lambda: threads.free == 2)
    assert await threads.run(lambda: "next") == "next"


async def test_an_abandoned_thread_ends_when_its_call_does(opened: threading.Event) -> None:
    threads, found = ThreadPool(1), []
    task = asyncio.create_task(
        threads.run(lambda: (found.append(threading.current_thread()), opened.wait()))
    )
    await until(lambda: bool(found))
    await give_up([task])
    opened.set()
    await asyncio.to_thread(found[0].join, SECONDS)
    assert not found[0].is_alive() and threads.free == 1


async def test_idle_threads_end_when_closed() -> None:
    threads = ThreadPool(3)
    thread = await threads.run(threading.current_thread)
    threads.close()
    await asyncio.to_thread(thread.join, SECONDS)
    assert not thread.is_alive()


async def test_a_thread_that_the_system_refuses_does_not_use_up_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = ThreadPool(1)
    with monkeypatch.context() as patch:
        patch.setattr(
            threading.Thread, "start", lambda _: raising(RuntimeError("can't start new thread"))
        )
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await threads.run(time.time)
    assert threads.free == 1
    assert await asyncio.wait_for(threads.run(lambda: "next"), SECONDS) == "next"


HUNG = """
import asyncio, threading
from batch_system.concurrency.thread_pool import ThreadPool
async def main():
    begun = threading.Event()
    call = asyncio.create_task(ThreadPool(1).run(lambda: (begun.set(), threading.Event().wait())))
    await asyncio.to_thread(begun.wait)
    call.cancel()
    await asyncio.wait([call])
asyncio.run(main())
print("over")
"""


def test_a_hung_thread_does_not_keep_the_process_alive() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HUNG], capture_output=True, text=True, timeout=20, check=True
    )
    assert (done.stdout, done.stderr) == ("over\n", "")
