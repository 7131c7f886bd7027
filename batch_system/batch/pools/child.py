"""A child as the service sees it: it gets a run, reports what it does, is stopped or killed, and
ends for a reason.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import ExitStack, suppress
from typing import Any

from batch_system import clock
from batch_system.batch.execution import attempt as attempts
from batch_system.batch.execution.attempt import PooledAttempt
from batch_system.batch.execution.ending import Ending
from batch_system.batch.pools import child_json, frames
from batch_system.batch.pools.exit_reasons import exit_error
from batch_system.batch.pools.nursery import Nursery
from batch_system.batch.pools.output import copy_lines, give_way
from batch_system.batch.queue import enqueue, upstream_results
from batch_system.batch.queue.requests import Starts
from batch_system.batch.tasks.partitions import Stage
from batch_system.concurrency.offload import offload
from batch_system.errors import BatchError, Interrupted, ProcessDied
from batch_system.logs import get_logger, relay
from batch_system.logs.mode import stamp_now

logger = get_logger("batch_system.batch")

EXIT_SECONDS = 2.0
"""How long a child may take to end after it has reported how its run ended, in seconds. After that
it is killed.
"""
MESSAGES_SECONDS, OUTPUT_SECONDS = 30.0, 1.0
"""How long a child's messages and output are read after its end, in seconds. Its own children may
hold both open.
"""
MOST_STARTS = 20
"""How many requests of one child, such as those of `start()`, are carried out at once."""


class Child:
    """The child process of one attempt. Its methods are called inside the run, so that the run's
    log gets their lines.

    Attributes:
      pid: Its process id; None before it begins.
      bound: How many bytes its process group may have in memory, including those that it shares
          with the nursery; None if there is no limit, or it is not known yet.
    """

    def __init__(
        self,
        attempt: PooledAttempt,
        find_nursery: Callable[[], Awaitable[tuple[Nursery, int]]],
        has_kernel_killed: Callable[[], Awaitable[bool]],
    ) -> None:
        self.attempt = attempt
        self.pid: int | None = None
        self.bound: int | None = None
        self._find_nursery = find_nursery
        self._has_kernel_killed = has_kernel_killed
        self._nursery: Nursery | None = None
        self._number: int | None = None
        self._is_killed = False
        self._ending: Ending | None = None
        self._trouble: ProcessDied | None = None
        self._outgoing: asyncio.Queue[bytes] | None = None
        """The messages for the child; None until it gets its job, which has to come first."""
        self._exit_timer: asyncio.TimerHandle | None = None
        self._has_begun = False
        self._starting = asyncio.Semaphore(MOST_STARTS)
        self._tasks: set[asyncio.Task[Any]] = set()

    async def execute(self) -> Ending:
        """Start the child, and wait for its end. Raises ProcessDied, and Interrupted if its nursery
        has ended.

        Cancelling this call asks the child to stop, and kills it after ABANDON_SECONDS. The ending
        that it has reported by then is returned; without one, CancelledError is raised.
        """
        work = asyncio.get_running_loop().create_task(self._live())
        self.attempt.state.on_stop = lambda _: self._tell_stop()
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await self._stop(work)
            if work.cancelled() or work.exception() is not None:
                raise
            return work.result()

    def kill(self, trouble: ProcessDied | None = None) -> None:
        """Kill the process and its process group. `trouble`: the error with which its run fails, if
        it does.
        """
        self._trouble = self._trouble or trouble
        self._is_killed = True
        if self._nursery is not None and self._number is not None:
            self._nursery.kill(self._number)

    async def _stop(self, work: asyncio.Task[Ending]) -> None:
        if self._nursery is None:
            work.cancel()
        self._tell_stop()
        if not await _is_over_within(work, 0 if self._is_killed else attempts.ABANDON_SECONDS):
            self.kill()
        while not await _is_over_within(work, None):
            continue  # cancelled again

    def _tell_stop(self) -> None:
        """Tell the child to stop, if that was asked."""
        stop, reason = self.attempt.body.stop, self.attempt.state.stop_reason
        if stop is not None:
            self._send({"reason": stop.reason or stop.outcome, "outcome": stop.outcome})
        elif reason is not None:
            self._send({"reason": reason, "outcome": None})

    async def _live(self) -> Ending:
        job = await self._job()
        nursery, self._number = await self._find_nursery()
        self._nursery = nursery
        reading: dict[asyncio.Task[None], float] = {}
        code: int | Interrupted
        try:
            ours, theirs, read_end, output, their_output = _connections()
        except OSError:  # this process can't open more files
            nursery.release(self._number)
            raise
        try:
            try:
                messages = self._spawn(self._read(read_end))
                reading[messages] = MESSAGES_SECONDS
                reading[self._spawn(copy_lines(output, self._tell_output))] = OUTPUT_SECONDS
                self._begin_to_write(ours, job)
                self.attempt.begins()
                begun = await nursery.begin(self._number, theirs, their_output)
            finally:
                theirs.close()
                os.close(their_output)
            self.pid = begun.pid
            if self._is_killed:
                self.kill()
            number = self._number
            messages.add_done_callback(lambda _: nursery.is_silent(number))
            code = await begun.ended
        except Interrupted as error:
            # The nursery has ended, and can't kill the processes that its child has started.
            code = error
            _kill_group(self.pid)
        finally:
            nursery.release(self._number)
            await self._finish(reading)
            ours.close()
            read_end.close()
        return await self._ending_by(code)

    async def _ending_by(self, code: int | Interrupted) -> Ending:
        """The ending that the child has reported, which counts whatever happened to it afterwards;
        otherwise what its exit means.
        """
        if self._ending is not None:
            return self._ending
        if isinstance(code, Interrupted):
            raise code
        raise self._trouble or exit_error(code, await self._has_kernel_killed())

    def _begin_to_write(self, ours: socket.socket, job: bytes) -> None:
        self._outgoing = asyncio.Queue()
        self._outgoing.put_nowait(job)
        self._spawn(self._write(ours, self._outgoing))
        self._tell_stop()

    async def _job(self) -> bytes:
        state, claimed = self.attempt.state, child_json.claimed_as_json(self.attempt.claimed)
        try:
            job = {
                "claimed": claimed,
                "stop_reason": state.stop_reason,
                "upstream": await self._upstream(),
            }
            return await offload(frames.encoded, job)
        except frames.BrokenFrame as error:
            raise ProcessDied(
                f"its parameters, with the results that it has waited for, are {error}"
            ) from None

    async def _upstream(self) -> list[child_json.Json]:
        """The slots that the run has waited for, if its code asks for them."""
        if not self.attempt.task.parameters.takes_upstream:
            return []
        upstream = await upstream_results.read(self.attempt.claimed.id)
        return [child_json.done_as_json(done) for done in upstream.values()]

    async def _finish(self, reading: dict[asyncio.Task[None], float]) -> None:
        """Read the last messages and output of the process, and close everything."""
        try:
            for task, seconds in reading.items():
                await asyncio.wait([task], timeout=seconds)
        finally:
            if self._exit_timer is not None:
                self._exit_timer.cancel()
            for task in list(self._tasks):
                task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _read(self, connection: socket.socket) -> None:
        """Handle the child's messages until it has ended."""
        try:
            async with frames.reader_of(connection) as reader:
                while (message := await frames.read(reader)) is not None:
                    began = clock.monotonic()
                    await self._take(message)
                    if "lines" in message:
                        await give_way(began)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            self.kill(
                ProcessDied(
                    "killed, because it sent its service a message that can't be read: "
                    f"{error!r:.200}"
                )
            )
        except OSError:  # it ended without reading everything
            return

    async def _take(self, message: dict[str, Any]) -> None:
        state = self.attempt.state
        if "lines" in message:
            for line in message["lines"]:
                relay.write(line)
        elif "progress" in message:
            done, total, text, before = message["progress"]
            state.meter.report(done, total, text, before=int(before))
        elif "refused" in message:
            for _ in range(min(message["refused"], 1_000)):
                state.on_refused()
        elif "start" in message:
            await self._starting.acquire()
            starts = child_json.starts_from_json(message["start"])
            self._spawn(self._answer(int(message["number"]), lambda: self._start(starts)))
        elif "members" in message:
            await self._starting.acquire()
            after = message["members"]
            self._spawn(self._answer(int(message["number"]), lambda: self._members(after)))
        elif "memory" in message and not self._has_begun:
            self._has_begun = True
            self.attempt.child_begins()
            if (bound := self.attempt.task.policies.memory) is not None:
                self.bound = bound + int(message["memory"])
        elif self._ending is None:
            self._ending = child_json.ending_from_json(message["end"])
            self._exit_timer = asyncio.get_running_loop().call_later(EXIT_SECONDS, self.kill)

    async def _answer(self, number: int, work: Callable[[], Awaitable[Any]]) -> None:
        """Carry out a request of the run: a `start()` or `start_all()`, or the next members of its
        group.
        """
        try:
            frame = await offload(frames.encoded, {"answer": number, "value": await work()})
        except (BatchError, frames.BrokenFrame) as error:
            frame = frames.encoded({"answer": number, **child_json.answer_as_json(error)})
        finally:
            self._starting.release()
        self._put(frame)

    async def _start(self, starts: Starts) -> child_json.Json:
        return child_json.started_as_json(await enqueue.start_checked(starts))

    async def _members(self, after: str | None) -> list[child_json.Json]:
        is_join = self.attempt.body.stage == Stage.JOIN
        members = await upstream_results.members(self.attempt.claimed.id, after, is_join)
        return [child_json.done_as_json(done) for done in members]

    def _tell_output(self, text: str) -> None:
        relay.write(relay.told(stamp_now(), "info", "stdout", text))

    def _send(self, message: dict[str, Any]) -> None:
        self._put(frames.encoded(message))

    def _put(self, frame: bytes) -> None:
        if self._outgoing is not None:
            self._outgoing.put_nowait(frame)

    async def _write(self, connection: socket.socket, outgoing: asyncio.Queue[bytes]) -> None:
        """Send messages to the child until it has ended. If it stops reading, its own messages are
        still read.
        """
        connection.setblocking(False)
        with connection, suppress(OSError):
            while True:
                await asyncio.get_running_loop().sock_sendall(connection, await outgoing.get())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _connections() -> tuple[socket.socket, socket.socket, socket.socket, int, int]:
    """The two ends of a socket, the first one duplicated for reading, and the two ends of a pipe.
    Raises OSError.
    """
    with ExitStack() as opened:
        ours, theirs = socket.socketpair()
        opened.callback(ours.close)
        opened.callback(theirs.close)
        read_end = ours.dup()
        opened.callback(read_end.close)
        output, their_output = os.pipe()
        opened.pop_all()
    return ours, theirs, read_end, output, their_output


def _kill_group(pid: int | None) -> None:
    if pid is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


async def _is_over_within(work: asyncio.Task[Ending], seconds: float | None) -> bool:
    """Whether the work ends within these seconds; None waits for its end. Cancelling the caller
    does not cancel the work.
    """
    with suppress(asyncio.CancelledError):
        await asyncio.wait([work], timeout=seconds)
    return work.done()
