"""The log of a run is bounded in bytes: each line, the lines that wait for the ledger, and the
blocks that are read.
"""

from __future__ import annotations

import json
import logging
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any

import pytest

from batch_system import failures, get_logger, logs
from batch_system.batch.context.attempt_state import LogBuffer
from batch_system.batch.execution import outcomes
from batch_system.batch.execution.outcomes import WriteBuffer
from batch_system.batch.ledger import run_logs
from batch_system.batch.ledger.run_logs import Block, LogLine
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.config import get_settings
from batch_system.database.engine import Database
from batch_system.operations.asking.databases import Databases
from batch_system.operations.runs.run_log import Reader
from tests.batch.attempts import Begun, ending_of
from tests.batch.ledger_world import NODE

KILOBYTES_100 = 100_000
LONGEST = 64_000
"""The bytes of a message that are kept."""
SAID = 100
"""The bytes of the note that says how much was cut."""

logger = get_logger("mine")


@contextmanager
def inside_a_run() -> Iterator[LogBuffer]:
    logs.set_up(stream=StringIO())
    buffer = LogBuffer({"task": "backup", "run": "run-1"})
    token = logs.run_log.set(buffer)
    try:
        yield buffer
    finally:
        logs.run_log.reset(token)


@pytest.mark.parametrize("character", ["x", "é", "日", "😀"])
@pytest.mark.parametrize("is_ours", [True, False])
def test_a_long_line_is_cut_and_says_how_much_of_it_is_missing(
    character: str, is_ours: bool
) -> None:
    with inside_a_run() as run:
        (logger if is_ours else logging.getLogger("library")).info(character * 1_000_000)
    [line] = run.take_lines()
    kept, said, _ = line.text.partition("... (cut: ")
    assert set(kept) == {character} and said
    assert LONGEST - 4 < len(kept.encode()) <= LONGEST
    assert line.text.endswith(f"{1_000_000 - len(kept):,} more characters)")


def test_a_line_of_the_allowed_length_stays_whole() -> None:
    with inside_a_run() as run:
        logger.info("x" * 64_000)
        logger.info("日" * 21_000)
    assert [line.text for line in run.take_lines()] == ["x" * 64_000, "日" * 21_000]


class Endless(Exception):
    def __str__(self) -> str:
        return "y" * 10_000_000


LARGE: dict[str, Callable[[], Any]] = {
    "text": lambda: "x" * 10_000_000,
    "list": lambda: list(range(1_000_000)),
    "nested": lambda: {"a": ["x" * 10_000] * 1_000},
    "number": lambda: 1 << 30_000_000,
    "object": Endless,
    "object in a list": lambda: [[Endless()]],
}


@pytest.mark.parametrize("name", LARGE)
def test_a_logged_value_is_cut_to_a_bounded_length(name: str) -> None:
    value = LARGE[name]()
    with inside_a_run() as run:
        logger.info("seen", value=value)
        logging.getLogger("library").info("seen", extra={"value": value})
    first, second = run.take_lines()
    assert first.text.startswith("seen value=") and len(first.text.encode()) <= LONGEST + SAID
    assert second.text == "seen"


def test_a_logged_error_is_cut_and_keeps_its_last_frame() -> None:
    with inside_a_run() as run:
        try:
            raise Endless
        except Endless as error:
            logger.error("it failed", exc_info=error, value="x" * 1_000_000)
    [line] = run.take_lines()
    assert len(line.text.encode()) <= 100_000
    assert "raise Endless" in line.text and "(10,0" in line.text


def test_long_lines_that_come_faster_than_the_ledger_are_bounded_in_bytes_and_counted() -> None:
    with inside_a_run() as run:
        for _ in range(800):
            logger.info("x" * KILOBYTES_100)
        lines = run.take_lines()
        assert sum(len(line.text.encode()) for line in lines) <= 4_000_000 + LONGEST + SAID
        assert (
            lines[-1].text
            == f"{801 - len(lines)} lines were dropped: they came faster than the ledger takes them"
        )
        logger.info("after that")
    assert [line.text for line in run.take_lines()] == ["after that"]


async def log_much(self: Any) -> None:
    for number in range(100):
        logger.info(f"{number} {'x' * 10_000}")


async def test_while_the_ledger_is_away_bytes_are_bounded_and_each_run_logs_what_was_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outcomes, "MOST_BYTES", 2_000_000)
    logs.set_up(stream=StringIO())
    waiting = WriteBuffer(NODE)
    for _ in range(10):
        begun = Begun(log_much)
        waiting.add_ending(begun.attempt, await begun.ending())
        waiting.put_back(waiting.take([]))  # it could not be written
    blocks = waiting.take([]).blocks
    assert sum(len(line.text) for block in blocks for line in block.lines) < 4_000_000
    lines = [line.text for block in blocks for line in block.lines]
    whole = sum(text.startswith("99 ") for text in lines)
    assert 0 < whole < 10
    assert [text for text in lines if "dropped" in text] == [
        "100 lines were dropped: they came faster than the ledger takes them"
    ] * (10 - whole)


async def test_running_attempts_keep_their_lines_while_the_write_buffer_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outcomes, "MOST_BYTES", 500_000)
    logs.set_up(stream=StringIO())
    waiting, begun = WriteBuffer(NODE), [Begun(log_much) for _ in range(3)]
    for each in begun:
        await each.ending()
    seen: list[int] = []
    for _ in range(5):
        group = waiting.take([each.attempt for each in begun])
        seen.append(sum(len(block.lines) for block in group.blocks))
        assert sum(block.size for block in group.blocks) < 2_000_000
    assert sum(seen) == 300 and seen[:2] != [300, 0]


async def test_a_log_of_many_bytes_is_stored_in_small_blocks_and_read_whole(
    ledger: Database,
) -> None:
    lines = [LogLine("now", "info", "mine", f"{number} " + "日" * 1_000) for number in range(1_000)]
    run, number, blocks = new_id(), 0, []
    for part in run_logs.split(lines):
        blocks.append(Block(run, 1, 1, number, part))
        number += len(part)
    assert max(block.size for block in blocks) < 300_000
    async with ledger.engine.begin() as connection:
        await run_logs.write(connection, run_logs.pack(blocks))
    reader = Reader(Databases(ledger, ledger, get_settings(), are_ready=True), run)
    assert [
        line async for block in reader.new_blocks(1) for line in block.unpacked().lines
    ] == lines
    async with ledger.reader.connect() as connection:
        assert await run_logs.tail(connection, run, 20) == lines[-20:]
        both = await run_logs.tails(connection, [run, new_id()], 20)
        assert both == {run: lines[-20:]}
        whole = await run_logs.tails(connection, [run], len(lines))
        assert whole == {run: lines}, "the last block has too few lines"


def test_a_block_that_would_fill_the_memory_is_refused_and_named() -> None:
    bomb = zlib.compress(json.dumps([["2026-11-25", "info", "mine", " " * 40_000_000]]).encode())
    assert len(bomb) < 50_000
    [line] = run_logs.unpack(bomb)
    assert line.at == "2026-11-25" and "more than 32,000,000 bytes" in line.text


def test_what_waits_for_a_slow_stderr_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs.handlers, "MAX_WAITING_BYTES", 1_000_000)
    gate = threading.Event()

    class Slow(StringIO):
        def write(self, text: str) -> int:
            gate.wait(30)
            return super().write(text)

    stream = Slow()
    logs.set_up(stream=stream)
    for _ in range(100):
        logger.info("x" * KILOBYTES_100)
    gate.set()
    logs.catch_up()
    logger.info("the last")
    logs.flush()
    assert len(stream.getvalue()) < 1_200_000
    assert (
        "lines were dropped, because they were logged faster than they could be written"
        in stream.getvalue()
    )
    assert "the last" in stream.getvalue()


async def test_an_error_in_the_ledger_is_cut_to_a_bounded_length() -> None:
    async def run(self: Any) -> None:
        raise Endless

    ending = await ending_of(run)
    assert ending.state == RunState.FAILED and len(ending.reason or "") < 1_000
    assert ending.error is not None
    stored = failures.facts_of(ending.error)
    assert stored["type"] == "Endless"
    assert len(stored["message"]) == 20_000 and len(stored["traceback"]) <= 20_000
    assert "raise Endless" in stored["traceback"]
