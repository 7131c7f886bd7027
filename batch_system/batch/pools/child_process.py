"""The process of a child: it executes the body of one attempt, reports to its service, and ends.

It has an event loop, and one thread each for sending and receiving. A sync run has a thread of its
own.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from batch_system.batch.context import fencing
from batch_system.batch.context.attempt_state import AttemptState, always_held
from batch_system.batch.context.lease import SharedLease
from batch_system.batch.context.upstream import Done, Upstream
from batch_system.batch.execution import attempt
from batch_system.batch.execution.attempt import Body
from batch_system.batch.execution.ending import Ending
from batch_system.batch.ledger.states import RunState
from batch_system.batch.pools import child_json, frames, memory, parent_process
from batch_system.batch.pools.child_sender import ChildSender
from batch_system.batch.pools.exit_reasons import memory_error
from batch_system.batch.pools.nursery_setup import NurserySetup
from batch_system.batch.queue import enqueue
from batch_system.batch.queue.requests import StartedRun, Starts
from batch_system.batch.tasks.registry import TaskRegistry
from batch_system.concurrency.thread_pool import ThreadPool
from batch_system.database.engine import Database
from batch_system.database.session import use_application_database
from batch_system.errors import BatchError, InvalidParameters
from batch_system.logs.relay import tell_lines
from batch_system.settings.reading import refresh_settings

SEND_SECONDS = 10.0
"""How long sending the last messages may take, in seconds."""
CLOSE_SECONDS = 1.0
"""How long closing the connections to the database may take, in seconds."""


def prepare() -> None:
    """Import what each child needs, before it is forked."""
    from batch_system.logs import structured

    structured.configure()
    parent_process.prepare()


def main(
    connection: socket.socket,
    output: int,
    setup: NurserySetup,
    database: Database,
    lease: SharedLease | None,
) -> None:
    """Execute the run that comes over `connection`, and end this process."""
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.close(output)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    job = frames.receive(connection)
    if job is None:
        os._exit(0)
    sender = ChildSender(connection)
    tell_lines(sender.add_line, setup.level)
    sender.start()
    with suppress(BatchError):  # the file .env may have changed since the nursery read it
        refresh_settings()
    holds_lease = always_held if lease is None else lambda: lease.is_held
    child = Child(connection, sender, setup, database, holds_lease)
    asyncio.new_event_loop().run_until_complete(child.execute(job))
    os._exit(0)


class Child:
    """The one run of this process."""

    def __init__(
        self,
        connection: socket.socket,
        sender: ChildSender,
        setup: NurserySetup,
        database: Database,
        holds_lease: Callable[[], bool],
    ) -> None:
        self._connection = connection
        self._sender = sender
        self._setup = setup
        self._database = database
        self._holds_lease = holds_lease
        self._asked: dict[int, asyncio.Future[Any]] = {}

    async def execute(self, job: dict[str, Any]) -> None:
        """Execute the run, and tell the service how it ended."""
        self._loop = asyncio.get_running_loop()
        guard = partial(fencing.guard, idle_seconds=self._setup.lease_seconds)
        use_application_database(self._database, guard)
        enqueue.use_forward(self._start)
        claimed = child_json.claimed_from_json(job["claimed"])
        self._slots = [child_json.done_from_json(values) for values in job["upstream"]]
        self._body = Body(claimed, TaskRegistry.get(claimed.task), self._holds_lease)
        state = self._body.state
        state.on_refused, state.stop_reason = self._sender.count_refused, job["stop_reason"]
        self._sender.meter = state.meter
        self._work = self._loop.create_task(self._run(), context=contextvars.Context())
        threading.Thread(
            target=self._listen, args=(state,), name="batch-child-listener", daemon=True
        ).start()
        self._tell_begin()
        await asyncio.wait([self._work])
        memory.unbound()
        ending = self._stopped_early() if self._work.cancelled() else self._work.result()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with suppress(OSError, ValueError):
                    stream.flush()
        self._sender.finish({"end": child_json.ending_as_json(ending)}, SEND_SECONDS)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._database.dispose(), CLOSE_SECONDS)

    def _tell_begin(self) -> None:
        """Limit the run's memory, and report how much memory this process has from the nursery's
        imports.
        """
        bound = self._body.task.policies.memory
        _, in_memory = memory.data_of_this_process()
        self._sender.send({"memory": in_memory})
        if bound is not None:
            memory.bound(bound)

    async def _run(self) -> Ending:
        self._body.enter()
        return await self._body.ending_of(self._execute)

    async def _execute(self) -> Ending:
        try:
            parameters = await self._body.parameters(self._read_upstream)
            self._body.has_begun = True
            return await self._body.execute(parameters, ThreadPool(1), attempt.ABANDON_SECONDS)
        except MemoryError as error:
            memory.unbound()
            if (bound := self._body.task.policies.memory) is None:
                raise
            raise memory_error(bound).with_traceback(error.__traceback__) from None

    def _stopped_early(self) -> Ending:
        """The ending of a run that was stopped before its first step."""
        return self._body.stop or self._body.failed(asyncio.CancelledError())

    def _listen(self, state: AttemptState) -> None:
        """Receive the service's messages in a thread, because the run may hold up the event
        loop.
        """
        # RuntimeError: the loop has ended.
        with suppress(OSError, frames.BrokenFrame, RuntimeError):
            while (message := frames.receive(self._connection)) is not None:
                if "answer" in message:
                    self._loop.call_soon_threadsafe(self._answer, message)
                    continue
                state.stop_reason = state.stop_reason or str(message["reason"])
                self._loop.call_soon_threadsafe(state.ask_to_stop, state.stop_reason)
                if message["outcome"] is not None:
                    stop = Ending(RunState.INTERRUPTED, message["outcome"], message["reason"])
                    self._loop.call_soon_threadsafe(self._stop, stop)
            os.killpg(0, signal.SIGKILL)  # the service has ended

    def _stop(self, ending: Ending) -> None:
        """Cancel the run, but only once: a second cancel would interrupt its cleanup."""
        if self._body.stop is None:
            self._body.stop = ending
            self._work.cancel()

    async def _read_upstream(self, run: str, parts: bool) -> Upstream:
        """What the run has waited for. The slots came with the job; the service is asked for the
        members or parts.
        """
        return Upstream(self._slots, self._members)

    async def _members(self, after: str | None) -> list[Done]:
        return [child_json.done_from_json(values) for values in await self._ask({"members": after})]

    async def _start(self, starts: Starts) -> StartedRun:
        """Have the service queue runs."""
        try:
            answer = await self._ask({"start": child_json.starts_as_json(starts)})
            return child_json.started_from_json(answer)
        except frames.BrokenFrame as error:
            raise InvalidParameters(f"start(): its parameters are {error}") from None

    async def _ask(self, request: dict[str, Any]) -> Any:
        """Send a request to the service, and wait for its answer. Raises BrokenFrame if it is too
        large.
        """
        number = len(self._asked) + 1
        answer = self._asked[number] = self._loop.create_future()
        self._sender.send({**request, "number": number})
        return await answer

    def _answer(self, message: dict[str, Any]) -> None:
        answer = self._asked[message["answer"]]
        if answer.done():
            return
        if "error" in message:
            answer.set_exception(child_json.error_from_json(message))
        else:
            answer.set_result(message["value"])
