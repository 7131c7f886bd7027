"""A nursery as the service sees it: starts its process, has it start children, and learns of their
ends.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from batch_system.batch.context.lease import Lease
from batch_system.batch.pools import frames
from batch_system.batch.pools.nursery_setup import NurserySetup
from batch_system.concurrency.own_process import arguments_of
from batch_system.errors import Interrupted, ProcessDied
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

COMMAND = arguments_of("batch_system.batch.pools.nursery_process")
SLOW_SECONDS = 30.0
"""A start that takes longer is logged, because an import may hang."""
POLL_SECONDS = 0.02
KILL_SECONDS = 5.0
"""How long a nursery may take to kill a child, in seconds. After that the nursery itself is
killed.
"""
END_SECONDS = 1.0
"""How long a nursery may take to end, in seconds. After that it is killed."""
REST_SECONDS = 1.0
"""How long the last messages of an ended process may take to arrive, in seconds."""


@dataclass(frozen=True)
class Begun:
    """A child that has begun. `ended`: its exit code; it raises Interrupted if the nursery ended
    before the child.
    """

    pid: int
    ended: asyncio.Future[int]


class Nursery:
    """One process of a pool, from its start to its end. With `forks` it makes many children,
    otherwise it becomes one.

    Attributes:
      asked: The tasks that it was asked to load.
      tasks: The tasks that it has.
      missing: Why it does not have the others.
      threads: How many threads it has after importing the tasks; 0 if not known.
      is_taken: Whether it was given to a run, whose child it becomes.
      gone: Set when the process has ended.
      end_reason: Why it has ended, in words for a sentence about it.
      idle: Set while it has no child.
    """

    def __init__(self, setup: NurserySetup, lease: Lease | None) -> None:
        self._setup = setup
        self._lease = lease
        self.asked = set(setup.tasks)
        self.tasks = set[str]()
        self.missing: dict[str, str] = {}
        self.threads = 0
        self.gone = asyncio.Event()
        self.idle = asyncio.Event()
        self.is_taken = False
        self.end_reason = "was killed"
        self.idle.set()
        self._pids: dict[int, asyncio.Future[int]] = {}
        self._ends: dict[int, asyncio.Future[int]] = {}
        self._number = 0
        self._sending = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process id; None before the start."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start the process, and wait until it has imported the tasks. Raises ProcessDied."""
        self._ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        shared = [self._lease.share()] if self._lease is not None else []
        self._control, theirs = socket.socketpair()
        self._control.setblocking(False)
        try:
            self._process = _started(theirs.fileno())
        except (OSError, ValueError) as error:
            self._control.close()
            interpreter = sys.executable or "(sys.executable is empty)"
            raise ProcessDied(
                f"no process could be started by the interpreter {interpreter}: {error}"
            ) from error
        finally:
            theirs.close()
        self._spawn(self._watch_exit(self._spawn(self._listen())))
        with suppress(OSError):  # it has already ended
            await self._send(self._setup.as_json(), shared)
        slow = asyncio.get_running_loop().call_later(SLOW_SECONDS, self._warn_slow)
        try:
            ready = await self._ready
        finally:
            slow.cancel()
        self.tasks = set(ready["tasks"])
        self.missing = ready["missing"]
        self.threads = ready["threads"]

    def reserve(self) -> int:
        """The number of a child that will begin. The nursery is not idle until `release`."""
        self._number += 1
        number, loop = self._number, asyncio.get_running_loop()
        self._pids[number], self._ends[number] = loop.create_future(), loop.create_future()
        for future in (self._pids[number], self._ends[number]):  # they may never be awaited
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.idle.clear()
        return number

    async def begin(self, number: int, connection: socket.socket, output: int) -> Begun:
        """Start the child with this number, and give it the two. The caller closes its own copies.

        Raises ProcessDied if no process could be forked, and Interrupted if the nursery has ended.
        The nursery is killed after LEASE_SECONDS without an answer.
        """
        begun, ended = self._pids[number], self._ends[number]
        if self.gone.is_set():
            raise self._died()
        self._expect(begun, self._setup.lease_seconds)
        with suppress(OSError):  # it has ended, which `_watch_exit` reports
            await self._send({"fork": number}, [connection.fileno(), output])
        return Begun(await begun, ended)

    def release(self, number: int) -> None:
        """Forget a child that has ended or was never started."""
        for answers in (self._pids, self._ends):
            if (answer := answers.pop(number, None)) is not None:
                answer.cancel()  # nothing awaits it
        if not self._ends:
            self.idle.set()

    def is_silent(self, number: int) -> None:
        """This child can't report anything any more, so its end has to be reported within
        LEASE_SECONDS.
        """
        if number in self._ends:
            self._expect(self._ends[number], self._setup.lease_seconds)

    def kill(self, number: int) -> None:
        """Kill a child and its process group. Its end is reported like any other."""
        if self._setup.forks:
            if number in self._ends:
                self._expect(self._ends[number], KILL_SECONDS)
            self._spawn(self._send_kill(number))
        else:
            self.kill_process()

    def kill_process(self) -> None:
        """Kill the nursery itself, and with it its children."""
        if self._process is not None and self._process.returncode is None:
            for kill in (os.killpg, os.kill):
                with suppress(ProcessLookupError, PermissionError):
                    kill(self._process.pid, signal.SIGKILL)

    async def end(self) -> None:
        """End the process and its remaining children, and wait for that."""
        if self._process is not None:
            with suppress(OSError):  # it has ended
                self._control.shutdown(socket.SHUT_WR)  # it kills its children and their processes
            with suppress(TimeoutError):
                await asyncio.wait_for(
                    self.gone.wait(), END_SECONDS if self.tasks and not self.is_taken else 0
                )
            self.kill_process()
            await self.gone.wait()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _expect(self, answer: asyncio.Future[int], seconds: float) -> None:
        """Kill the process if it does not give this answer in time. It may be frozen, and nothing
        else would end the run.
        """
        timer = asyncio.get_running_loop().call_later(seconds, self._kill_unless, answer, seconds)
        answer.add_done_callback(lambda _: timer.cancel())

    def _kill_unless(self, answer: asyncio.Future[int], seconds: float) -> None:
        if not answer.done():
            self.end_reason = f"did not answer for {seconds:g} s, and was killed"
            self.kill_process()

    async def _send_kill(self, number: int) -> None:
        with suppress(OSError):
            await self._send({"kill": number})

    async def _send(self, message: dict[str, Any], descriptors: list[int] | None = None) -> None:
        loop, data = asyncio.get_running_loop(), frames.encoded(message)
        async with self._sending:
            sent = 0
            while descriptors and not sent:
                try:
                    sent = socket.send_fds(self._control, [data], descriptors)
                except BlockingIOError:
                    await asyncio.sleep(POLL_SECONDS)
            await loop.sock_sendall(self._control, data[sent:])

    async def _listen(self) -> None:
        loop, received = asyncio.get_running_loop(), frames.Frames()
        try:
            while data := await loop.sock_recv(self._control, 65_536):
                for message in received.feed(data):
                    self._take(message)
        except OSError:
            return
        except (LookupError, TypeError, ValueError):  # an imported module has written to the socket
            self.kill_process()

    def _take(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            self._ready.set_result(message["ready"])
        elif "ended" in message:
            self._set_ended(message["ended"], message["code"])
        elif (
            pid := self._pids.get(int(message.get("forked", message.get("failed", 0))), None)
        ) is not None and not pid.done():
            if "failed" in message:
                pid.set_exception(
                    ProcessDied(f"no process could be forked for it: {message['error']}")
                )
            else:
                pid.set_result(message["pid"])

    async def _watch_exit(self, listening: asyncio.Task[None]) -> None:
        """Wait for the end of the process, kill the rest of its process group, and notify all
        waiters.
        """
        assert self._process is not None
        await _exited(self._process)
        self.kill_process()  # until it is reaped, no other process can have its id
        code = self._process.wait()
        await asyncio.wait([listening], timeout=REST_SECONDS)
        listening.cancel()
        await asyncio.wait([listening])
        self._control.close()
        self.gone.set()
        if not self._ready.done():
            self._ready.set_exception(
                ProcessDied(f"its process ended with status {code} while it imported the tasks")
            )
            self._ready.exception()
        for begun in self._pids.values():
            if not begun.done():
                begun.set_exception(self._died())
        for ended in self._ends.values():
            if not ended.done():
                if self._setup.forks:
                    ended.set_exception(self._died())
                else:
                    ended.set_result(code)

    def _set_ended(self, number: int, code: int) -> None:
        if (ended := self._ends.get(number)) is not None and not ended.done():
            ended.set_result(code)

    def _died(self) -> Interrupted:
        return Interrupted(
            f"its parent process (the nursery of pool {self._setup.pool}) {self.end_reason}"
        )

    def _warn_slow(self) -> None:
        logger.warning(
            f"the nursery of pool {self._setup.pool} has not imported the tasks after "
            f"{SLOW_SECONDS:g} s: no run of this pool starts here before that"
        )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _started(stdin: int) -> subprocess.Popen[bytes]:
    """Start the process in this thread: the kernel ends the nursery when the thread that started it
    ends.
    """
    command = (sys.executable or "", *COMMAND)
    return subprocess.Popen(command, stdin=stdin, stdout=subprocess.DEVNULL, start_new_session=True)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


async def _exited(process: subprocess.Popen[bytes]) -> None:
    """Wait until the process has ended. It is not reaped."""
    if hasattr(os, "pidfd_open"):
        with suppress(OSError):
            await _readable(os.pidfd_open(process.pid))
            return
    while not _has_ended(process):
        await asyncio.sleep(POLL_SECONDS)


async def _readable(descriptor: int) -> None:
    """Wait until the descriptor can be read, and close it."""
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
