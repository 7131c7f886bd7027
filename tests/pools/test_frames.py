"""The parts of a pool that need no process: frames, lines of output, reasons, and the lease that
processes share.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import pytest

from batch_system import Limit, Rate, clock
from batch_system.batch.context.lease import Lease, SharedLease
from batch_system.batch.execution.ending import Ending
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.states import Origin, RunState
from batch_system.batch.pools import child_json, frames
from batch_system.batch.pools.exit_reasons import exit_error, memory_error
from batch_system.batch.pools.output import Lines
from batch_system.batch.queue.requests import Startable, StartRequest, Starts
from batch_system.batch.tasks.limit import Queueing
from batch_system.errors import DatabaseUnreachable, InvalidParameters, UnknownTask
from batch_system.logs.log_lines import LONGEST_LINE
from tests.batch.attempts import SLOT

MESSAGES: list[dict[str, Any]] = [{"a": 1}, {"text": "é\ud800\0"}, {}, {"large": "x" * 300_000}]


def test_messages_are_the_same_however_they_are_cut() -> None:
    small = MESSAGES[:3]
    data = b"".join(map(frames.encoded, small))
    for size in range(1, len(data) + 1):
        received = frames.Frames()
        cut = [data[i : i + size] for i in range(0, len(data), size)]
        assert [message for part in cut for message in received.feed(part)] == small


def send_all(to: socket.socket) -> None:
    with to:
        to.sendall(b"".join(map(frames.encoded, MESSAGES)))


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_reader_on_the_loop_and_one_in_a_thread_read_the_same(is_async: bool) -> None:
    ours, theirs = socket.socketpair()
    sending = asyncio.create_task(asyncio.to_thread(send_all, theirs))
    found = []
    if is_async:
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        while (message := await frames.read(reader)) is not None:
            found.append(message)
        writer.close()
    else:
        with ours:
            while (message := await asyncio.to_thread(frames.receive, ours)) is not None:
                found.append(message)
    await sending
    assert found == MESSAGES


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff\xff", b"\0\0\0\1x", b"\0\0\0\2[]", b"\0\0\0\1\xff"]
)
def test_data_that_is_not_a_frame_is_refused_before_it_is_stored(data: bytes) -> None:
    with pytest.raises(frames.BrokenFrame):
        frames.Frames().feed(data)


def test_a_message_that_is_too_large_is_not_sent() -> None:
    with pytest.raises(frames.BrokenFrame, match="allowed: up to 16,000,000"):
        frames.encoded({"x": "x" * frames.LARGEST})


def test_output_is_cut_into_lines() -> None:
    lines = Lines()
    assert list(lines.feed(b"one\r\ntw")) == ["one"]
    assert list(lines.feed(b"o\n\n \n\xff\n")) == ["two", "\ufffd"]
    assert list(lines.feed(b"x" * LONGEST_LINE)) == []
    assert list(lines.feed(b"y" * 1_000_000)) == []
    [line] = lines.feed(b"\nlast")
    assert line == "x" * LONGEST_LINE + "... (cut: 1,000,000 more bytes)"
    assert list(lines.rest()) == ["last"] and list(lines.rest()) == []


@pytest.mark.parametrize(
    ("code", "by_kernel", "reason"),
    [
        (0, False, "exited with status 0 before run() had ended"),
        (3, True, "exited with status 3 before run() had ended"),
        (-signal.SIGSEGV, True, "killed by signal 11 (SIGSEGV)"),
        (-signal.SIGKILL, False, "killed by signal 9 (SIGKILL)"),
        (-signal.SIGKILL, True, "killed by the kernel, because the machine ran out of memory"),
        (-40, False, "killed by signal 40"),
    ],
)
def test_each_end_has_its_reason(code: int, by_kernel: bool, reason: str) -> None:
    assert exit_error(code, by_kernel).message == reason


@pytest.mark.parametrize(
    ("size", "text"),
    [(2**31, "2 GiB"), (64 * 2**20, "64 MiB"), (1_500_000_000, "1.397 GiB"), (2**50, "1 PiB")],
)
def test_a_bound_is_shown_as_an_author_would_write_it(size: int, text: str) -> None:
    assert memory_error(size).message == f"used more than {text}"
    assert isinstance(memory_error(size), MemoryError)


def test_another_process_sees_a_lease_as_long_as_it_is_held() -> None:
    lease = Lease(30)
    shared = SharedLease(os.dup(lease.share()))
    assert not shared.is_held
    lease.renew(clock.boottime())
    assert lease.is_held and shared.is_held
    lease.renew(clock.boottime() - 26)  # a lease is usable for five sixths of its seconds
    assert not lease.is_held and not shared.is_held
    lease.renew(clock.boottime())
    again = SharedLease(os.dup(lease.share()))
    lease.end()
    assert not shared.is_held and not again.is_held


def test_runs_and_endings_come_back_as_they_were() -> None:
    claimed = Claimed("id", "task", SLOT, Origin.SCHEDULE, {"a": [1]}, 2, 3, SLOT, SLOT, 1, "00-1")
    assert child_json.claimed_from_json(child_json.claimed_as_json(claimed)) == claimed
    without = Claimed("id", "task", None, Origin.MANUAL, None, 1, 1, SLOT, SLOT)
    assert child_json.claimed_from_json(child_json.claimed_as_json(without)) == without
    ending = Ending(RunState.SUCCEEDED, "succeeded", None, {"a": 1}, None, None, "empty")
    assert child_json.ending_from_json(child_json.ending_as_json(ending)) == ending
    failed = Ending(RunState.RETRYING, "failed", "no", None, ValueError("no good"), 1.5, "1:ab")
    back = child_json.ending_from_json(child_json.ending_as_json(failed))
    assert (type(back.error).__name__, str(back.error), back.wait) == ("ValueError", "no good", 1.5)
    limited = Queueing("a", None, Limit(2, key="b", total=9), 1, Rate(3, per=60, key="b"))
    for queueing in (Queueing("a", "a"), limited):
        request = StartRequest(
            Startable("a", "a.py", queueing, 5), {"b": 1}, "key", SLOT, priority="low"
        )
        starts = Starts((request,))
        assert child_json.starts_from_json(child_json.starts_as_json(starts)) == starts


def wrong_wait(values: dict[str, Any]) -> None:
    values["wait"] = float("nan")


def wrong_state(values: dict[str, Any]) -> None:
    values["state"] = "queued up"


def wrong_error(values: dict[str, Any]) -> None:
    values["error"] = {"type": "A\0", "message": "", "traceback": ""}


@pytest.mark.parametrize("spoil", [wrong_wait, wrong_state, wrong_error])
def test_an_invalid_ending_is_refused(spoil: Callable[[dict[str, Any]], None]) -> None:
    values = child_json.ending_as_json(
        Ending(RunState.RETRYING, "failed", "no", None, ValueError("no"), 1.0)
    )
    spoil(values)
    with pytest.raises(ValueError):  # noqa: PT011
        child_json.ending_from_json(values)


def test_errors_of_start_keep_their_class() -> None:
    for error in (UnknownTask("a"), InvalidParameters("b"), DatabaseUnreachable("c")):
        back = child_json.error_from_json(child_json.answer_as_json(error))
        assert (type(back), back.message) == (type(error), error.message)
