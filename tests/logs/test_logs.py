from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from batch_system import get_logger, logs
from batch_system.batch.context.attempt_state import MAX_WAITING_LINES, AttemptState, LogBuffer
from tests.hostile import HOSTILE, SEEN, acts

logger = get_logger("mine")


def run_of(attempt: int = 1) -> LogBuffer:
    return AttemptState.of("run-1", "backup", attempt).log


@contextmanager
def inside(run: LogBuffer) -> Iterator[None]:
    token = logs.run_log.set(run)
    try:
        yield
    finally:
        logs.run_log.reset(token)


class Lines:
    """The text written since `set_up`."""

    def __init__(self, format: str = "json", level: str = "INFO") -> None:
        self._stream = StringIO()
        logs.set_up(level, format, self._stream)

    @property
    def text(self) -> str:
        logs.flush()
        return self._stream.getvalue()

    @property
    def json(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]


def failure() -> Exception:
    try:
        raise ValueError("no good")
    except ValueError as error:
        return error


def test_a_console_line_has_time_level_text_and_pairs() -> None:
    lines = Lines("console")
    logger.info("Cleaned up", count=3)
    assert lines.text.rstrip().endswith("[info     ] Cleaned up                     [mine] count=3")
    assert lines.text[:4].isdigit() and "\x1b" not in lines.text


def test_a_json_line_has_time_level_logger_and_the_pairs() -> None:
    lines = Lines()
    logger.warning("Cleaned up", count=3, at=Path("a"), nested={"x": [1, {2}]}, rate=float("nan"))
    [line] = lines.json
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "Cleaned up",
        "level": "warning",
        "logger": "mine",
        "count": 3,
        "at": "a",
        "nested": {"x": [1, [2]]},
        "rate": "nan",
    }


@pytest.mark.parametrize("format", ["json", "console"])
@pytest.mark.parametrize("is_ours", [True, False])
def test_an_error_is_logged_with_its_traceback_however_it_is_passed(
    format: str, is_ours: bool
) -> None:
    lines, log = Lines(format), logger if is_ours else logging.getLogger("library")
    log.error("given", exc_info=failure())
    try:
        raise KeyError("handled")
    except KeyError:
        log.error("true", exc_info=True)
        log.exception("exception")
    log.error("none", exc_info=True)  # noqa: LOG014 - what an author writes
    assert (
        lines.text.count("ValueError: no good") == 1
        and lines.text.count("KeyError: 'handled'") == 2
    )
    assert (
        lines.text.count("Traceback (most recent call last)") == 3 and "NoneType" not in lines.text
    )


def test_every_line_of_a_run_has_task_and_run_also_those_of_other_libraries() -> None:
    lines = Lines()
    with inside(run_of()):
        logger.info("ours")
        logging.getLogger("library").info("theirs %d", 1)
    logger.info("outside")
    ours, theirs, outside = lines.json
    for line in (ours, theirs):
        assert (line["task"], line["run"]) == ("backup", "run-1")
    assert (theirs["event"], theirs["logger"]) == ("theirs 1", "library")
    assert "run" not in outside and "batch_stamp" not in outside


def test_lines_of_a_later_attempt_have_its_number() -> None:
    lines = Lines()
    with inside(run_of(attempt=2)):
        logger.info("again")
    assert lines.json[0]["attempt"] == 2


def test_the_lines_of_a_run_are_kept_with_pairs_and_tracebacks() -> None:
    Lines()
    run = run_of()
    with inside(run):
        logger.info("Cleaned up", count=3, stamp="mine")
        logger.error("Failed", exc_info=failure())
        logging.getLogger("library").error("They failed", exc_info=failure())
    kept = run.take_lines()
    assert (kept[0].level, kept[0].logger, kept[0].text) == (
        "info",
        "mine",
        "Cleaned up count=3 stamp='mine'",
    )
    assert [line.text.split("\n")[0] for line in kept[1:]] == ["Failed", "They failed"]
    assert all(
        line.text.endswith("ValueError: no good") and "Traceback" in line.text for line in kept[1:]
    )
    assert run.take_lines() == []


async def test_concurrent_runs_keep_their_own_lines() -> None:
    Lines()
    runs = [run_of() for _ in range(3)]

    async def body(run: LogBuffer, number: int) -> None:
        logs.run_log.set(run)
        for _ in range(3):
            logger.info(f"of {number}")
            await asyncio.sleep(0)

    await asyncio.gather(*(body(run, number) for number, run in enumerate(runs)))
    assert [[line.text for line in run.take_lines()] for run in runs] == [
        [f"of {n}"] * 3 for n in range(3)
    ]


def test_lines_that_come_faster_than_the_ledger_are_counted() -> None:
    run = run_of()
    for _ in range(MAX_WAITING_LINES + 5):
        run.keep_line("now", "info", "mine", "line")
    kept = run.take_lines()
    assert len(kept) == MAX_WAITING_LINES + 1 and kept[-1].text.startswith("5 lines were dropped")


def test_a_line_shows_its_values_as_they_were_when_it_was_logged() -> None:
    lines, counts, found = Lines(), {"seen": 0}, [1]
    logger.info("first", counts=counts)
    logging.getLogger("library").info("found %s", found)
    counts["seen"] = 7
    found.append(2)
    first, second = lines.json
    assert (first["counts"], second["event"]) == ({"seen": 0}, "found [1]")


def test_an_iterator_that_is_logged_is_not_used_up() -> None:
    Lines()
    numbers = iter([1, 2])
    with inside(run_of()):
        logger.info("numbers", numbers=numbers)
    assert list(numbers) == [1, 2]


class Unreadable:
    def __str__(self) -> str:
        raise ZeroDivisionError

    __repr__ = __str__


def test_arguments_that_do_not_fit_the_text_never_raise() -> None:
    lines, run, library = Lines(), run_of(), logging.getLogger("library")
    with inside(run):
        logger.info("%d of it", "much")
        library.info("%d of it", "much")
        library.info("%s", Unreadable())
        logger.info("odd", thing=Unreadable())
        library.info({"a": 1})
        logger.info("100% sure")
    assert len(lines.json) == len(run.take_lines()) == 6
    assert all("of it" in line["event"] for line in lines.json[:2])
    assert lines.json[3]["thing"] == "<Unreadable without a text>"


def test_positional_arguments_work_as_in_stdlib() -> None:
    lines = Lines()
    logger.info("%s of %s", 1, 2)
    assert lines.json[0]["event"] == "1 of 2" and "positional_args" not in lines.json[0]


def test_lines_below_the_level_are_dropped() -> None:
    lines = Lines(level="WARNING")
    logger.info("no")
    logging.getLogger("library").info("no")
    logger.warning("yes")
    assert [line["event"] for line in lines.json] == ["yes"]


def test_a_second_set_up_replaces_the_first() -> None:
    first, second = Lines(), Lines()
    logger.info("once")
    assert (first.text, len(second.json)) == ("", 1)


IN_A_SHELL = """
from batch_system import get_logger
get_logger("shell").info("not shown")
try: 1 / 0
except ZeroDivisionError as error: get_logger("shell").error("It failed", exc_info=error, part=3)
"""


def test_without_a_service_a_line_is_logged_by_stdlib() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_A_SHELL], capture_output=True, text=True, check=True
    )
    assert done.stderr.startswith("It failed part=3\nTraceback") and "not shown" not in done.stderr


async def test_a_slow_stderr_does_not_block_the_loop_and_loses_no_line() -> None:
    reading, writing = os.pipe()
    count, text = 2_000, "x" * 200  # six times what a pipe takes
    with os.fdopen(writing, "w") as stream:
        logs.set_up(stream=stream)
        for number in range(count):
            logger.info(f"{number} {text}")
        # Nobody has read anything yet: a loop that waits for the pipe would not get here.
        await asyncio.sleep(0)
        seen: list[bytes] = []
        reader = threading.Thread(
            target=lambda: seen.extend(iter(lambda: os.read(reading, 65536), b""))
        )
        reader.start()
        await asyncio.to_thread(logs.flush)
    await asyncio.to_thread(reader.join, 10)
    os.close(reading)
    assert b"".join(seen).count(b"\n") == count


def test_lines_beyond_what_may_wait_are_dropped_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logs.handlers, "MAX_WAITING", 10)
    gate = threading.Event()

    class Slow(StringIO):
        def write(self, text: str) -> int:
            gate.wait(5)
            return super().write(text)

    stream = Slow()
    logs.set_up(stream=stream)
    for number in range(50):
        logger.info(f"line {number}")
    gate.set()
    while "line 9" not in stream.getvalue():
        time.sleep(0.001)
    logger.info("the last")
    logs.flush()
    *_, told, last = stream.getvalue().splitlines()
    assert (
        "lines were dropped, because they were logged faster than they could be written" in told
        and "the last" in last
    )


STUCK = """
import sys
from batch_system import get_logger, logs
logs.handlers.FLUSH_SECONDS = 0.5
logs.set_up()
for _ in range(5000):
    get_logger("mine").info("x" * 200)
print("over", flush=True)
"""


def test_a_process_ends_although_its_stderr_is_never_read() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.wait(timeout=15) == 0
        assert process.stdout is not None and process.stdout.read() == b"over\n"
    finally:
        process.kill()
        process.communicate()


def log_everywhere(text: str) -> None:
    logger.warning(
        f"event {text}", text=f"value {text}", bare=text, nested=[text], **{f"key{text}": 1}
    )
    logging.getLogger(f"library.{text}").warning("theirs %s", text, extra={"own": text})
    try:
        raise ValueError(f"error {text}") from KeyError(text)
    except ValueError as error:
        error.add_note(f"note {text}")
        logger.error("failed", exc_info=error)


@pytest.mark.parametrize("format", ["json", "console"])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_line_has_no_character_that_acts_in_a_terminal(format: str, text: str) -> None:
    lines = Lines(format)
    log_everywhere(f"{text} {SEEN}")
    assert not {char for char in lines.text if acts(char)}
    if format == "console":
        assert f"{text.encode('unicode_escape').decode()} {SEEN}" in lines.text
    else:
        assert lines.json[0]["event"] == f"event {text} {SEEN}"


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_in_a_terminal_only_our_colours_act(text: str) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    logs.set_up("INFO", "console", stream)
    log_everywhere(text)
    logs.flush()
    assert "\x1b[31m" in stream.getvalue()
    without_colours = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert text not in stream.getvalue()
    assert not {char for char in without_colours if acts(char)}


def test_a_line_feed_in_a_message_can_not_forge_a_line() -> None:
    lines = Lines("console")
    forged = "2026-11-25T02:00:00.000Z [info     ] all is well"
    logger.info(f"seen\n{forged}", value=f"seen\n{forged}")
    try:
        raise ValueError(f"seen\n{forged}")
    except ValueError as error:
        logger.error("failed", exc_info=error)
    written = lines.text.splitlines()
    assert sum(line[:4].isdigit() for line in written) == 2
    assert f"    {forged}" in written
    assert all(line.startswith("    ") for line in written if not line[:4].isdigit())
