"""`batch watch`, and how far a run is while `batch run` waits for it: a bar in a terminal, lines
where it is piped.
"""

from __future__ import annotations

import asyncio
import io
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from rich.console import Console, Group
from sqlalchemy import update

from batch_system import clock
from batch_system.batch.ledger import tables
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.cli import bar, progress
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.operations.runs import read, run_log
from tests.batch.ledger_world import until as in_time
from tests.cli.test_runs import insert
from tests.commands import Batch, Done, in_this_process, refuses
from tests.processes import BATCH, environment
from tests.terminal import Screen, terminal

AT = datetime(2026, 11, 25, 2, 0, tzinfo=UTC)

SLOW = '''
import asyncio
from pathlib import Path
from batch_system import BaseTask, current_run, get_logger

class Slow(BaseTask):
    """Says how far it is, until a file says that it may end."""
    name, schedule = "slow", None

    async def run(
        self, lines: int = 0, long: int = 20, total: int = 1000, prints: bool = True
    ) -> int:
        for done in range(total):
            item = f"at item {done // 100 * 100} of a file whose name is a long one"
            current_run().progress(done + 1, total, item)
            if done % 10 == 0 and done < 10 * lines:
                get_logger("slow").info(f"line {done}, " + "and so on " * long)
                if prints:
                    print(f"printed {done}")
            await asyncio.sleep(0.01)
            if Path("end").exists():
                return done
        return total
'''


@pytest.fixture
def batch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    yield from in_this_process(capsys, monkeypatch)


@pytest.fixture
def slow(tmp_path: Path) -> None:
    (tmp_path / "tasks" / "slow.py").write_text(SLOW)


@pytest.fixture
async def prepared(tmp_path: Path) -> AsyncIterator[Database]:
    """The ledger of this folder, which the commands read."""
    ledger = Database(f"sqlite+aiosqlite:///{tmp_path}/ledger.db", setting="LEDGER_URL")
    await migrate(ledger, LEDGER_HISTORY)
    yield ledger
    await ledger.dispose()


async def change(ledger: Database, **values: Any) -> None:
    async with ledger.engine.begin() as connection:
        await connection.execute(update(tables.runs).values(**values))


def row(**more: Any) -> dict[str, Any]:
    """As `following.looks` has it."""
    known = {
        "id": "01a2",
        "task": "slow",
        "state": "running",
        "reason": None,
        "message": None,
        "due_at": AT,
        "now": AT,
    }
    return {
        **known,
        "count": None,
        "total": None,
        "rate": None,
        "eta": None,
        "attempt_started_at": AT,
        **more,
    }


HALF = {"count": 412_300, "total": 1_000_000, "rate": 8_240.4, "eta": AT + timedelta(seconds=71)}


# In words


def test_only_what_is_known_is_shown() -> None:
    assert progress.words(row(**HALF), AT) == [
        "412,300 of 1,000,000",
        "41.2 %",
        "8,240 items/s",
        "1 min 11 s left",
    ]
    assert progress.words(row(count=7, rate=0.05), AT) == ["7", "3.0 items/min"]
    assert progress.words(row(), AT) == []


@pytest.mark.parametrize(
    ("count", "total", "said"),
    [
        (0, 5, "0.0 %"),
        (9_999, 10_000, "99.9 %"),
        (5, 5, "100 %"),
        (6, 5, None),
        (0, 0, None),
        (5, None, None),
    ],
)
def test_percent_is_rounded_down_and_never_a_hundred_too_early(
    count: int, total: int | None, said: str | None
) -> None:
    assert progress.percent({"count": count, "total": total}) == said


@pytest.mark.parametrize(
    ("per_second", "said"),
    [
        (0.0, "0 items/s"),
        (1.0, "1.0 items/s"),
        (250.4, "250 items/s"),
        (0.5, "30.0 items/min"),
        (1e-4, "0.4 items/h"),
    ],
)
def test_a_rate_is_said_in_the_unit_that_fits(per_second: float, said: str) -> None:
    assert progress.rate(per_second) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-3, "0 s"),
        (59.4, "59 s"),
        (71, "1 min 11 s"),
        (7_443, "2 h 04 min"),
        (3 * 86_400 + 14_500, "3 d 04 h"),
    ],
)
def test_a_duration_has_two_units(seconds: float, said: str) -> None:
    assert progress.duration(seconds) == said


# As lines


class Looks:
    """Those that a command takes at the run that it follows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._number = 0
        look = read.current

        async def counted(*given: Any) -> Any:
            found = await look(*given)
            self._number += 1
            return found

        monkeypatch.setattr(read, "current", counted)
        monkeypatch.setattr(run_log, "POLL_SECONDS", 0.01)

    async def more(self, number: int) -> None:
        """Wait for so many."""
        enough = self._number + number

        async def is_enough() -> bool:
            return self._number >= enough

        await in_time(is_enough)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    return Looks(monkeypatch)


async def watch(batch: Batch, *words: str) -> Done:
    return await asyncio.to_thread(batch, "watch", *words)


@pytest.mark.rest
async def test_piped_it_prints_a_line_when_something_has_changed_and_the_end(
    batch: Batch, prepared: Database, looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bar, "LINE_SECONDS", 0.0)
    run = await insert(prepared, task="slow", started_at=AT, attempt_started_at=AT)
    watching = asyncio.create_task(watch(batch, run[:-1]))
    for number in range(3):
        at = clock.now()
        await change(
            prepared,
            count=number * 10,
            total=50,
            rate=10.0,
            message=f"file {number}",
            progress_at=at,
        )
        await looks.more(3)
    await change(prepared, state="retrying", reason="OSError: away")
    await looks.more(3)
    await change(prepared, state="failed", finished_at=AT + timedelta(seconds=9))
    done = await asyncio.wait_for(watching, 30)
    assert (done.code, done.err) == (1, "")
    *lines, last = done.out.splitlines()
    stamps = [re.fullmatch(r"(2\S+ \S+Z) (.*)", line) for line in lines]
    said = [re.sub(r"\d s left", "N s left", stamp[2]) for stamp in stamps if stamp]
    assert said[-4:] == [
        "slow running: 0 of 50, 0.0 %, 10.0 items/s, N s left: file 0",
        "slow running: 10 of 50, 20.0 %, 10.0 items/s, N s left: file 1",
        "slow running: 20 of 50, 40.0 %, 10.0 items/s, N s left: file 2",
        "slow retrying: OSError: away",
    ]
    assert said[:-4] in ([], ["slow running"])
    assert last == f"run {run} failed in 9.00 s: OSError: away"


def test_a_line_comes_no_more_often_than_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(clock, "monotonic", lambda: now[0])
    told: list[str] = []
    lines = bar.Lines(lambda _, text: told.append(text))
    for second in range(25):
        now[0] = 1000.0 + second
        lines.update_run(row(count=second))
    assert told == ["slow running: 0", "slow running: 10", "slow running: 20"]
    lines.update_run(row(count=25, state="interrupted", reason="the service stopped"))
    assert told[3:] == ["slow interrupted: the service stopped"]


def test_of_a_run_that_says_nothing_nothing_is_told_beside_its_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bar, "LINE_SECONDS", 0.0)
    told: list[str] = []
    lines = bar.Lines(lambda _, text: told.append(text), states=False)
    for state in ("queued", "running", "retrying"):
        lines.update_run(row(state=state, reason="x"))
    assert told == []
    lines.update_run(row(message="file\x1b[2K\n3"))
    assert told == ["slow running: file\\x1b[2K 3"]


def test_a_run_here_logs_its_progress_if_it_is_piped(
    batch: Batch, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bar, "LINE_SECONDS", 0.1)
    monkeypatch.setattr(run_log, "POLL_SECONDS", 0.05)
    done = batch("run", "slow", "--param", "total=120", LOG_FORMAT="json")
    assert done.code == 0 and re.fullmatch(r"run \S+ succeeded in \S+ s\n120\n", done.out)
    run = done.out.split()[1]
    told = [line for line in done.err.splitlines() if '"slow running: ' in line]
    assert told and all(f'"run": "{run}"' in line and " of 120, " in line for line in told)


@pytest.mark.parametrize(
    ("state", "code"), [("succeeded", 0), ("failed", 1), ("cancelled", 1), ("skipped", 1)]
)
async def test_the_exit_code_is_how_the_run_ended(
    batch: Batch, prepared: Database, state: str, code: int
) -> None:
    run = await insert(
        prepared, state=state, started_at=AT, finished_at=AT + timedelta(seconds=1.5)
    )
    done = await watch(batch, run)
    assert (done.code, done.out) == (code, f"run {run} {state} in 1.50 s\n")


def test_an_unknown_run_or_task_is_refused(batch: Batch, slow: None) -> None:
    refuses(batch("watch", "01a212f3"), "'01a212f3'")
    refuses(batch("watch", "nope"), "'nope'", "slow")
    refuses(batch("watch", "slow"), "has no run yet")


@pytest.mark.rest
async def test_a_run_that_is_deleted_meanwhile_is_named(
    batch: Batch, prepared: Database, looks: Looks
) -> None:
    run = await insert(prepared, attempt_started_at=AT)
    watching = asyncio.create_task(watch(batch, run))
    await looks.more(1)
    async with prepared.engine.begin() as connection:
        await connection.execute(tables.runs.delete())
    done = await asyncio.wait_for(watching, 30)
    assert done.code == 2 and done.err == f"batch: the run {run} was deleted meanwhile\n"


# As a bar


def drawn(width: int, now: datetime = AT, **more: Any) -> list[str]:
    written = io.StringIO()
    console = Console(
        file=written, width=width, force_terminal=True, color_system=None, legacy_windows=False
    )
    console.print(Group(*bar.view(row(**more), now, width)), end="")
    screen = Screen(width)
    screen.feed(written.getvalue().removesuffix("\n").replace("\n", "\r\n"))
    return screen.lines


def test_a_wide_terminal_has_it_on_one_line_and_the_message_below() -> None:
    top, message = drawn(120, **HALF, message="file 7")
    assert (
        top
        == f"slow running  {'━' * 16}{' ' * 24}  412,300 of 1,000,000  41.2 %  8,240 items/s  1 "
        "min 11 s left"
    )
    assert message == "file 7"


@pytest.mark.parametrize("width", [20, 40, 60, 79, 80])
def test_nothing_is_wider_than_the_terminal(width: int) -> None:
    lines = drawn(
        width,
        **HALF,
        message="a message that is long " * 9,
        task="a_task_with_a_name_that_is_long_too",
    )
    assert all(len(line) <= width for line in lines)
    assert lines[0].endswith("…" if width <= 40 else " running")
    told = " ".join(" ".join(lines).split())
    assert "412,300 of 1,000,000" in told and "1 min 11 s left" in told and lines[-1].endswith("…")
    assert any(re.fullmatch(r"[━╸╺]+", line) for line in lines)


def test_without_a_total_it_has_the_count_and_how_long_it_has_run() -> None:
    [line] = drawn(80, AT + timedelta(seconds=125), count=1_234, rate=5.0)
    assert re.fullmatch(r"slow running  [━ ]+  1,234  5.0 items/s  2 min 05 s so far", line)


def test_what_waits_says_why_and_until_when() -> None:
    top, reason = drawn(
        80,
        state="retrying",
        reason="OSError: away",
        message="old",
        due_at=AT + timedelta(seconds=8),
    )
    assert (top, reason) == ("slow retrying  next attempt in 8 s", "OSError: away")
    assert drawn(80, state="queued") == ["slow queued"]


class FakeTerminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "term", "kind"),
    [
        (FakeTerminal(), "xterm", bar.Bar),
        (FakeTerminal(), "dumb", bar.Lines),
        (io.StringIO(), "xterm", bar.Lines),
    ],
    ids=["terminal", "dumb", "pipe"],
)
def test_only_a_terminal_that_can_move_its_cursor_has_a_bar(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, term: str, kind: type[Any]
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI sets it where nobody looks
    assert type(bar.display(stream, lambda *_: None)) is kind


def test_a_terminal_that_can_not_show_it_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(FakeTerminal, "encoding", "latin-1")
    assert isinstance(bar.display(FakeTerminal(), lambda *_: None), bar.Lines)


def test_lines_of_several_threads_leave_nothing_of_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = FakeTerminal()
    shown = bar.display(stream, lambda *_: None)
    assert isinstance(shown, bar.Bar)

    def print_lines(name: str) -> None:
        for number in range(200):
            shown.write_above(f"{name} {number}")

    def redraw() -> None:
        for number in range(200):  # with and without a second line
            shown.update_run(row(**HALF, message="at an item" if number % 2 else None))
            shown.refresh()

    works = [partial(print_lines, "a"), partial(print_lines, "b"), redraw]
    threads = [Thread(target=work) for work in works]
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with shown:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(switch_interval)
    screen = Screen(100)
    screen.feed(stream.getvalue().replace("\n", "\r\n"))
    expected = [f"{name} {number}" for name in "ab" for number in range(200)]
    assert sorted(filter(None, screen.lines)) == sorted(expected)


RUNNING = (
    r"slow running  ━*[╸╺]?[━ ]*  [\d,]+ of 1,000  \d+\.\d %  [\d.]+ items/s  (\d+ min )?\d+ s left"
)


def has_bar(lines: list[str]) -> bool:
    return (
        len(lines) > 1
        and bool(re.fullmatch(RUNNING, lines[-2]))
        and lines[-1].startswith("at item")
    )


@pytest.mark.rest
async def test_lines_of_the_log_stand_above_the_bar_and_do_not_tear_it(
    slow: None, tmp_path: Path
) -> None:
    def see() -> tuple[list[str], int, list[str]]:
        words = [*BATCH, "run", "slow", "--param", "lines=20"]
        with terminal(tmp_path, words, 120, {"NO_COLOR": "1"}) as shown:
            halfway = shown.until(lambda lines: has_bar(lines) and "printed 120" in lines)
            assert not shown.screen.has_cursor
            shown.until(lambda lines: "printed 190" in lines)
            (tmp_path / "end").touch()
            code = shown.end()
            assert shown.screen.has_cursor and "\x1b[3" not in shown.raw
            return halfway, code, shown.screen.lines

    halfway, code, end = await asyncio.to_thread(see)
    assert code == 0
    logged = "".join(end[:-3]).replace(" ", "")
    for number in range(0, 200, 10):
        assert len(re.findall(rf"\[info\]line{number},(andsoon){{20}}\[slow\]run=", logged)) == 1
    assert [line for line in end if line.startswith("printed")] == [
        f"printed {n}" for n in range(0, 200, 10)
    ]
    assert "of 1,000" not in "".join(end) and "━" not in "".join(end)
    assert (
        re.fullmatch(r"run \S+ succeeded in \S+ s", end[-3])
        and re.fullmatch(r"\d+", end[-2])
        and end[-1] == ""
    )
    assert sum("━" in line for line in halfway) == 1


async def test_ctrl_c_leaves_the_run_alone_and_says_so(prepared: Database, tmp_path: Path) -> None:
    now = clock.now()
    run = await insert(prepared, task="slow", started_at=now, attempt_started_at=now)
    await change(prepared, count=20, total=1_000, rate=1.0, progress_at=now + timedelta(hours=1))

    def see() -> tuple[list[str], int, list[str]]:
        with terminal(tmp_path, [*BATCH, "watch", run], 40) as shown:
            halfway = shown.until(lambda lines: any("left" in line for line in lines))
            shown.process.send_signal(signal.SIGINT)
            code = shown.end()
            assert shown.screen.has_cursor
            return halfway, code, shown.screen.lines

    halfway, code, end = await asyncio.to_thread(see)
    top, drawn_bar, words = halfway[:3]
    assert (top, re.sub(r"[━╸╺]", "━", drawn_bar)) == ("slow running", "━" * 40)
    assert re.sub(" +", " ", words) == "20 of 1,000 2.0 % 1.0 items/s"
    assert code == 130
    assert "".join(end).replace(" ", "") == f"batch:theruncontinues;`batchwatch{run}`followsitagain"


@pytest.mark.rest
async def test_a_terminal_that_hangs_does_not_hold_up_the_run(slow: None, tmp_path: Path) -> None:
    """After Ctrl-S, or if a connection hangs, nobody reads, and the output waits."""

    def see() -> None:
        params = ("lines=1000", "long=2000", "prints=false")
        with terminal(
            tmp_path, [*BATCH, "run", "slow", *(f"--param={one}" for one in params)], 100
        ) as shown:
            shown.until(lambda lines: any("line 0" in line for line in lines))
            until(lambda: count(tmp_path) > 100)  # so many lines fit into no terminal's buffer
            (tmp_path / "end").touch()
            until(lambda: count(tmp_path, "succeeded") > 100)
            assert shown.end() == 0

    await asyncio.to_thread(see)


def count(folder: Path, state: str = "running") -> int:
    with closing(sqlite3.connect(folder / "ledger.db")) as connection:
        found = connection.execute(
            "SELECT count FROM batch_runs WHERE state = ?", [state]
        ).fetchone()
    return found[0] or 0 if found else 0


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.05)


def test_watching_imports_no_rich_before_it_is_needed() -> None:
    code = "import sys, batch_system.cli; sys.exit('rich.live' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60)
    assert done.returncode == 0
