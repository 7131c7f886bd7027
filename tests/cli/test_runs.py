"""`batch show` and `batch logs`: all about a run or a task, and its log while it is being
written.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from batch_system import clock
from batch_system.batch.cron.cron import schedule
from batch_system.batch.firing import pauses, task_sync
from batch_system.batch.ledger import run_ids, run_logs, runs, tables
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.run_logs import Block, LogLine
from batch_system.batch.ledger.runs import NewRun
from batch_system.config import get_settings
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.errors import UnknownRun
from batch_system.operations.asking.databases import Databases
from batch_system.operations.asking.results import LogBlock
from batch_system.operations.runs import run_log
from batch_system.operations.runs.run_log import Reader
from tests.asking import operations_on
from tests.batch.ledger_world import fire, know, make_task
from tests.cli.test_console import BOLD, in_terminal, without_styles
from tests.commands import Batch, Done, in_this_process, refuses
from tests.processes import BATCH, environment, process
from tests.processes import batch as command

AT = datetime(2026, 11, 25, 2, 0, tzinfo=UTC)

FLAKY = '''
from __future__ import annotations
from datetime import date, timedelta
from batch_system import BaseTask, Retry, Missed, get_logger

class Flaky(BaseTask):
    """Fails at first."""
    name, schedule, timezone = "flaky", "30 2 * * *", "Europe/Berlin"
    retry = Retry(attempts=3, wait=0.01)
    missed = Missed("once", max_age=timedelta(days=2))
    tries = 0

    async def run(self, failures: int = 0, day: date | None = None, note=None) -> dict[str, int]:
        Flaky.tries += 1
        get_logger("flaky").warning(f"try {Flaky.tries}")
        if Flaky.tries <= failures:
            raise ValueError("not yet")
        return {"tries": Flaky.tries}
'''


@pytest.fixture
def batch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    yield from in_this_process(capsys, monkeypatch)


@pytest.fixture
def flaky(tmp_path: Path) -> None:
    (tmp_path / "tasks" / "flaky.py").write_text(FLAKY)


def run_of(done: Done) -> str:
    return done.out.split()[1]


def values(out: str) -> dict[str, str]:
    """The `name  value` lines at the beginning."""
    pairs = (re.split(r" {2,}", line, maxsplit=1) for line in out.split("\n\n")[0].splitlines())
    return {name: value for name, value in pairs if name}


# show RUN


def test_show_has_everything_about_a_run(batch: Batch, flaky: None, database_url: str) -> None:
    words = ("--param", "failures=1", "--param", "day=2026-11-24", "--slot", "2026-11-25T01:30")
    run = run_of(batch("run", "flaky", *words, LEDGER_URL=database_url, LOGNAME="ann"))
    done = batch("show", run)
    assert done.code == 0
    shown = values(done.out)
    assert (shown["run"], shown["task"], shown["state"], shown["attempt"]) == (
        run,
        "flaky",
        "succeeded",
        "2",
    )
    assert shown["origin"] == "manual, requested by ann"
    assert json.loads(shown["params"]) == {"failures": 1, "day": "2026-11-24"}
    assert shown["result"] == '{"tries": 2}'
    assert re.fullmatch(r"process \d+ on \S+ \([0-9a-f-]{36}\)", shown["node"])
    assert re.fullmatch(r"2\S+ \S+Z, waited \d+\.\d\d s", shown["started"])
    assert re.fullmatch(r"2\S+ \S+Z, took \d+\.\d\d s", shown["finished"])
    attempts, log = (part.splitlines() for part in done.out.split("\n\n")[1:])
    assert attempts[0] == "Attempts"
    assert [line.split()[1] for line in attempts[2:]] == ["failed", "succeeded"]
    assert "ValueError: not yet" in attempts[2]
    assert log[0].startswith("Log") and f"batch logs {run}" in log[0]
    assert "try 1" in log[1] and "try 2" in log[-1]


def test_show_of_a_failed_run_has_the_traceback_of_its_last_attempt(
    batch: Batch, flaky: None
) -> None:
    run = run_of(batch("run", "flaky", "--param", "failures=9"))
    out = batch("show", run).out
    assert values(out)["state"] == "failed: ValueError: not yet"
    error = next(part for part in out.split("\n\n") if part.startswith("Error of the last attempt"))
    assert "Traceback" in error and 'raise ValueError("not yet")' in error


def test_show_as_json_has_the_whole_row_the_attempts_and_the_log(
    batch: Batch, flaky: None, database_url: str
) -> None:
    run = run_of(batch("run", "flaky", "--param", "failures=1", LEDGER_URL=database_url))
    found = batch("show", run, "--json").json
    assert found["kind"] == "run"
    assert set(found) == {"kind", "timezone", "attempts", "log", "eta", "chain", "parts"} | set(
        tables.runs.c.keys()
    )
    assert [attempt["outcome"] for attempt in found["attempts"]] == ["failed", "succeeded"]
    assert found["attempts"][0]["error"]["type"] == "ValueError"
    assert found["log"][0]["text"] == "try 1" and found["result"] == {"tries": 2}
    assert found["node"]["pid"] > 0


async def insert(ledger: Database, **more: Any) -> str:
    fields: dict[str, Any] = {
        "id": tables.new_id(),
        "task": "flaky",
        "slot": None,
        "origin": "manual",
        "state": "running",
        "rank": 1,
        "catch_up": False,
        "due_at": AT,
        "created_at": AT,
        "fence": 1,
        "attempt": 1,
        **more,
    }
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [NewRun(**fields)])
    return str(fields["id"])


@pytest.fixture
async def prepared(tmp_path: Path) -> AsyncIterator[Database]:
    """The ledger of this folder, which the commands read."""
    ledger = Database(f"sqlite+aiosqlite:///{tmp_path}/ledger.db", setting="LEDGER_URL")
    await migrate(ledger, LEDGER_HISTORY)
    yield ledger
    await ledger.dispose()


async def show(batch: Batch, *words: str, **settings: str) -> Done:
    return await asyncio.to_thread(batch, "show", *words, **settings)


async def test_the_slot_is_shown_in_utc_and_in_the_tasks_zone(
    batch: Batch, ledger: Database, ledger_url: str
) -> None:
    await know(ledger, make_task("flaky", "30 2 * * *", timezone="Europe/Berlin"))
    run = await insert(ledger, slot=datetime(2026, 11, 25, 1, 30, tzinfo=UTC))
    shown = values((await show(batch, run, LEDGER_URL=ledger_url)).out)
    assert shown["slot"] == "2026-11-25 01:30:00Z (2026-11-25 02:30:00+01:00 in Europe/Berlin)"


async def test_a_running_run_says_how_far_it_is(batch: Batch, prepared: Database) -> None:
    run = await insert(
        prepared, started_at=AT, attempt_started_at=clock.now() - timedelta(seconds=90)
    )
    async with prepared.engine.begin() as connection:
        await connection.execute(update(tables.runs).values(count=1_200, total=5_000))
    shown = values((await show(batch, run)).out)
    assert shown["progress"] == "1,200 of 5,000, 24.0 %"
    assert re.fullmatch(r"9\d\.\d\d s", shown["running for"])
    assert "finished" not in shown and "message" not in shown


async def test_how_fast_a_run_is_and_when_it_ends_is_shown_where_it_runs(
    batch: Batch, ledger: Database, ledger_url: str
) -> None:
    now = clock.now()
    await know(ledger, make_task("flaky"))
    run = await insert(ledger, started_at=AT, attempt_started_at=now - timedelta(seconds=90))
    said = {"count": 1_200, "total": 5_000, "message": "file 3", "rate": 10.0, "progress_at": now}
    async with ledger.engine.begin() as connection:
        await connection.execute(update(tables.runs).values(**said))
    shown = values((await show(batch, run, LEDGER_URL=ledger_url)).out)
    assert re.fullmatch(
        r"1,200 of 5,000, 24\.0 %, 10\.0 items/s, 6 min \d\d s left", shown["progress"]
    )
    assert shown["message"] == "file 3"
    row = (await show(batch, run, "--json")).json
    [listed] = (await asyncio.to_thread(batch, "runs", "--json")).json
    [in_task] = (await show(batch, "flaky", "--json")).json["runs"]
    for found in (row, listed, in_task):
        assert {name: found[name] for name in ("count", "total", "message", "rate")} == {
            name: said[name] for name in ("count", "total", "message", "rate")
        }
        assert datetime.fromisoformat(found["eta"]) == now + timedelta(seconds=380)
    table = (await asyncio.to_thread(batch, "runs")).out.splitlines()
    assert (
        dict(zip(table[0].split(), re.split(r" {2,}", table[1]), strict=True))["progress"]
        == "24.0 %"
    )


ONE, TWO = "01a212f3-41c9-7d59-930b-0d8b837dd87e", "01a212f3-41ca-7d59-930b-0d8b837dd87e"


async def test_the_first_digits_of_an_id_are_enough(
    batch: Batch, ledger: Database, ledger_url: str
) -> None:
    for id in (ONE, TWO):
        await insert(ledger, id=id)
    for prefix in ("01a212f3-41c9", "01A212F341C9", ONE, ONE.replace("-", "")):
        found = (await show(batch, prefix, "--json", LEDGER_URL=ledger_url)).json
        assert (found["kind"], found["id"]) == ("run", ONE)


async def test_showing_a_run_runs_no_code_of_an_author(
    batch: Batch, prepared: Database, tmp_path: Path
) -> None:
    (tmp_path / "tasks" / "loud.py").write_text("open('ran', 'w')\n")
    await insert(prepared, id=ONE)
    for words in ("show", ONE), ("show", ONE[:13]), ("logs", ONE[:13]):
        assert (await asyncio.to_thread(batch, *words)).code == 0
    assert not (tmp_path / "ran").exists()


async def test_first_digits_of_several_ids_are_refused_with_the_candidates(
    batch: Batch, ledger: Database, ledger_url: str
) -> None:
    for id in (ONE, TWO):
        await insert(ledger, id=id)
    done = await show(batch, "01a212f3", LEDGER_URL=ledger_url)
    refuses(done, "several", "'01a212f3'", f"{ONE} (flaky, running)", TWO)


async def test_of_many_candidates_ten_are_named(batch: Batch, prepared: Database) -> None:
    for number in range(12):
        await insert(prepared, id=ONE[:-2] + f"{number:02}")
    done = await show(batch, ONE[:8])
    refuses(done, ONE[:-2] + "11", "and more")
    assert done.err.count("(flaky, running)") == 10 and ONE[:-2] + "00" not in done.err


async def test_a_task_whose_name_looks_like_an_id_is_a_task(
    batch: Batch, prepared: Database
) -> None:
    await insert(prepared, id="deadbeef-0000-7000-8000-000000000000")
    await know(prepared, make_task("deadbeef"))
    assert (await show(batch, "deadbeef", "--json")).json["kind"] == "task"
    assert (await show(batch, "deadbeef0", "--json")).json["kind"] == "run"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nope", ["'nope'", "flaky"]),
        ("abcdef", ["'abcdef'", "6 digits", "flaky"]),
        ("01a21", ["'01a21'", "6 digits"]),
        (ONE, [ONE, "flaky"]),
        ("", ["''"]),
    ],
)
@pytest.mark.parametrize("name", ["show", "logs"])
def test_what_is_neither_a_run_nor_a_task_is_refused(
    batch: Batch, flaky: None, name: str, given: str, words: list[str]
) -> None:
    refuses(batch(name, given), *words)
    batch("run", "flaky")
    refuses(batch(name, given), *words)


# show TASK


@pytest.mark.first_start
def test_show_of_a_task_without_a_ledger_has_what_its_file_says(
    batch: Batch, flaky: None, tmp_path: Path
) -> None:
    done = batch("show", "flaky")
    assert done.code == 0
    shown = values(done.out)
    assert shown["description"] == "Fails at first."
    assert shown["source"] == "tasks/flaky.py"
    assert shown["schedule"] == "30 2 * * *: At 02:30 every day (Europe/Berlin)"
    assert shown["last run"] == "none yet"
    lines = [line.strip() for line in done.out.splitlines()]
    assert "retry.wait = 0.01" in lines and "missed.max_age = 172800.0" in lines
    assert shown["policies"] == "retry.attempts = 3"
    assert shown["parameters"] == "failures: int = 0"
    assert "day: date | None = None" in lines and "note = None" in lines
    assert not (tmp_path / "ledger.db").exists()


def test_show_of_a_task_shows_its_next_times(batch: Batch, flaky: None) -> None:
    with clock.moved(datetime(2027, 3, 26, 12, tzinfo=UTC)):
        found = batch("show", "flaky", "--json").json
    assert [row["local"] for row in found["next"]][:3] == [
        "2027-03-27T02:30:00+01:00",
        "2027-03-28T03:00:00+02:00",
        "2027-03-29T02:30:00+02:00",
    ]
    assert len(found["next"]) == 5


def test_show_of_a_task_has_its_last_runs(batch: Batch, flaky: None, database_url: str) -> None:
    first = run_of(batch("run", "flaky", LEDGER_URL=database_url))
    second = run_of(batch("run", "flaky", "--param", "failures=100"))
    out = batch("show", "flaky").out
    assert values(out)["last run"] == second
    listed = next(part for part in out.split("\n\n") if part.startswith("Last runs")).splitlines()
    assert [line.split()[0] for line in listed[2:]] == [second, first]
    assert "ValueError: not yet" in listed[2]


async def test_show_of_a_task_has_missed_ranges_the_pause_and_past_schedules(
    batch: Batch, ledger: Database, ledger_url: str, tmp_path: Path
) -> None:
    (tmp_path / "tasks" / "hello.py").write_text(FLAKY.replace('"flaky", "30 2', '"hello", "0 3'))
    with clock.moved(AT):
        old = make_task("hello", "0 1 * * *")
        loaded = await know(ledger, old)
        await fire(ledger, loaded, clock.advance(timedelta(days=3)))
        async with ledger.engine.begin() as connection:
            await task_sync.set_schedules(
                connection, {"hello": schedule("0 3 * * *")}, loaded, tables.new_id()
            )
            await pauses.pause(connection, "hello", "ann", loaded, tables.new_id())
        done = await show(batch, "hello", LEDGER_URL=ledger_url)
        found = (await show(batch, "hello", "--json")).json
    shown = values(done.out)
    assert shown["paused"] == "since 2026-11-28 02:00:00Z by ann"
    assert "next" not in shown and found["next"] == []
    assert shown["schedule"] == "0 3 * * *: At 03:00 every day"  # the ledger's, by which it fires
    assert [row["cron"] for row in found["schedules"]] == ["0 1 * * *", "0 3 * * *"]
    assert found["missed"][0]["count"] == 2
    assert "no service fired it" in done.out and "Present and past schedules" in done.out


async def test_a_task_whose_file_is_gone_is_shown_from_the_ledger(
    batch: Batch, prepared: Database
) -> None:
    await know(prepared, make_task("gone", "0 1 * * *", timeout=60))
    done = await show(batch, "gone")
    shown = values(done.out)
    assert "can't be used here" in shown["source"]
    assert shown["policies"] == "timeout = 60"
    assert "parameters" not in shown


async def test_without_a_tasks_folder_show_prints_what_the_ledger_knows(
    batch: Batch, prepared: Database, tmp_path: Path
) -> None:
    (tmp_path / "tasks").rename(tmp_path / "elsewhere")
    await know(prepared, make_task("flaky", "0 1 * * *"))
    await insert(prepared, id=ONE)
    await write(prepared, ONE, 1, 0, "there")
    for given in ("flaky", ONE[:-1]):
        assert (await show(batch, given)).code == 0
        assert (await asyncio.to_thread(batch, "logs", given)).out.split()[-2] == "there"
    refuses(await show(batch, "nope"), "'nope'", "the tasks are: flaky")
    refuses(await asyncio.to_thread(batch, "logs", "nope"), "'nope'", "the tasks are: flaky")


@pytest.mark.parametrize(
    "why", ["a person", "its schedule is empty now", "it was removed", "removed in a pause"]
)
async def test_a_task_that_does_not_fire_has_no_next_times_and_only_a_person_pauses(
    batch: Batch, prepared: Database, tmp_path: Path, why: str
) -> None:
    (tmp_path / "tasks" / "flaky.py").write_text(FLAKY)
    loaded = await know(prepared, make_task("flaky", "30 2 * * *", timezone="Europe/Berlin"))
    async with prepared.engine.begin() as connection:
        if why in ("a person", "removed in a pause"):
            await pauses.pause(connection, "flaky", "ann", loaded, tables.new_id())
        # For the services: what the file says here does not fire.
        if why == "its schedule is empty now":
            await task_sync.set_schedules(connection, {"flaky": None}, loaded, tables.new_id())
    if "removed" in why:
        (tmp_path / "tasks" / "flaky.py").unlink()
        async with prepared.engine.begin() as connection:
            await task_sync.remove_gone(connection, ["flaky"], nobody)
    shown, found = (
        values((await show(batch, "flaky")).out),
        (await show(batch, "flaky", "--json")).json,
    )
    assert found["next"] == [] and "next" not in shown
    assert shown.get("paused", "").endswith("by ann") is (why in ("a person", "removed in a pause"))
    assert ("paused" in shown) is (found["paused_at"] is not None)
    assert (shown["schedule"] == "none any more") is (why != "a person")
    assert ("its file has been gone since" in shown["source"]) is ("removed" in why)


async def nobody(_: object) -> set[str]:
    return set()


# logs


def lines(*texts: str, level: str = "info") -> list[LogLine]:
    return [LogLine("2026-11-25T02:00:00.000Z", level, "tasks.flaky", text) for text in texts]


async def write(
    ledger: Database, run: str, fence: int, first_line: int, *texts: str, attempt: int = 1
) -> None:
    async with ledger.engine.begin() as connection:
        await run_logs.write(
            connection, run_logs.pack([Block(run, fence, attempt, first_line, lines(*texts))])
        )


async def end(ledger: Database, state: str = "succeeded") -> None:
    async with ledger.engine.begin() as connection:
        await connection.execute(update(tables.runs).values(state=state, finished_at=clock.now()))


def test_logs_shows_the_lines_of_a_run_with_each_attempt(
    batch: Batch, flaky: None, database_url: str
) -> None:
    run = run_of(batch("run", "flaky", "--param", "failures=1", LEDGER_URL=database_url))
    done = batch("logs", run)
    assert (done.code, done.err) == (0, "")
    shown = done.out.splitlines()
    assert re.fullmatch(r"2\S+Z \[warning \] try 1 \[flaky\]", shown[0])
    assert "    Traceback (most recent call last):" in shown
    assert shown[-2] == "--- attempt 2 ---" and shown[-1].endswith("try 2 [flaky]")


def test_logs_of_a_task_are_those_of_its_newest_run(batch: Batch, flaky: None) -> None:
    for number in (1, 2):
        batch("run", "flaky")
        assert batch("logs", "flaky").out.endswith(f"try {number} [flaky]\n")
        assert batch("logs", "flaky").out.count("\n") == 1


def test_logs_as_json_is_an_object_a_line(batch: Batch, flaky: None) -> None:
    run = run_of(batch("run", "flaky", "--param", "failures=1"))
    found = [json.loads(line) for line in batch("logs", run, "--json").out.splitlines()]
    assert set(found[0]) == {"at", "level", "logger", "text", "attempt"}
    assert [(line["level"], line["attempt"]) for line in found] == [
        ("warning", 1),
        ("error", 1),
        ("warning", 2),
    ]


def test_a_task_without_a_run_has_no_log(batch: Batch, flaky: None) -> None:
    refuses(batch("logs", "flaky"), "'flaky'", "no run yet")


async def test_an_attempt_that_was_begun_again_is_marked(batch: Batch, prepared: Database) -> None:
    run = await insert(prepared, fence=2)
    await write(prepared, run, 1, 0, "first")
    await write(prepared, run, 2, 0, "again")
    out = (await asyncio.to_thread(batch, "logs", run)).out
    assert out.splitlines()[1] == "--- attempt 1, started again ---"


async def test_a_line_of_a_log_does_not_move_the_cursor(batch: Batch, prepared: Database) -> None:
    run = await insert(prepared)
    await write(prepared, run, 1, 0, "a\x1b[2Jb\tc\n  d")
    out = (await asyncio.to_thread(batch, "logs", run)).out
    assert "\x1b" not in out
    assert out.splitlines()[1] == "      d"


async def test_levels_are_coloured_in_a_terminal_and_plain_in_a_pipe(
    prepared: Database, tmp_path: Path
) -> None:
    run = await insert(prepared)
    async with prepared.engine.begin() as connection:
        block = Block(run, 1, 2, 0, [*lines("fine"), *lines("bad", level="error")])
        await run_logs.write(connection, run_logs.pack([block]))
    shown = await asyncio.to_thread(in_terminal, tmp_path, [*BATCH, "logs", run], 80)
    assert f"{BOLD}--- attempt 2 ---" in shown and "\x1b[31m[error   ]\x1b[0m bad" in shown
    assert " [info    ] fine" in shown
    piped = await asyncio.to_thread(command, tmp_path, "logs", run)
    assert piped.stdout.splitlines() == without_styles(shown)


def texts(block: LogBlock | str) -> list[str]:
    assert isinstance(block, LogBlock)
    return [line.text for line in block.lines]


async def everything(reader: Reader, newest: int) -> list[str]:
    return [
        line.text async for block in reader.new_blocks(newest) for line in block.unpacked().lines
    ]


async def test_no_line_is_missed_or_repeated_when_blocks_come_under_a_new_fence(
    ledger: Database, ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEDGER_URL", ledger_url)
    run = await insert(ledger)
    await write(ledger, run, 1, 0, "a", "b")
    reader = Reader(Databases(ledger, ledger, get_settings(), are_ready=True), run)
    assert await everything(reader, 1) == ["a", "b"]
    await write(ledger, run, 3, 0, "e")
    await write(ledger, run, 1, 2, "c")
    assert await everything(reader, 3) == ["c", "e"]
    await write(ledger, run, 2, 0, "d")  # a node that lost the run wrote late what it had
    await write(ledger, run, 3, 1, "f", "g")
    assert await everything(reader, 3) == ["d", "f", "g"]
    assert await everything(reader, 3) == []


async def test_a_long_log_is_read_some_blocks_at_a_time(
    ledger: Database, ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEDGER_URL", ledger_url)
    run = await insert(ledger)
    blocks = [Block(run, 1, 1, 2 * n, lines(f"{n}", f"{n}'")) for n in range(100)]
    async with ledger.engine.begin() as connection:
        await run_logs.write(connection, run_logs.pack(blocks))
    await end(ledger)
    unpacked = 0
    unpack = run_logs.unpack

    def counted(block: bytes) -> Iterator[LogLine]:
        nonlocal unpacked
        unpacked += 1
        return unpack(block)

    monkeypatch.setattr(run_logs, "unpack", counted)
    seen: list[LogBlock] = []
    async with aclosing(run_log.blocks(operations_on(ledger).context, run, follow=True)) as found:
        async for block in found:
            if isinstance(block, LogBlock):
                seen.append(block)
                assert unpacked <= len(seen) + run_log.PAGE
    assert [texts(block) for block in seen] == [
        [line.text for line in block.lines] for block in blocks
    ]


async def test_the_last_lines_are_read_from_the_end(ledger: Database) -> None:
    run = await insert(ledger)
    for number in range(5):
        await write(ledger, run, 1 + number // 3, 2 * (number % 3), f"{number}a", f"{number}b")
    async with ledger.reader.connect() as connection:
        assert [line.text for line in await run_logs.tail(connection, run, 5)] == [
            "2b",
            "3a",
            "3b",
            "4a",
            "4b",
        ]
        assert len(await run_logs.tail(connection, run, 100)) == 10
        assert await run_logs.tail(connection, tables.new_id(), 5) == []


async def test_following_goes_on_until_the_run_has_ended(
    ledger: Database, ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEDGER_URL", ledger_url)
    monkeypatch.setattr(run_log, "POLL_SECONDS", 0.01)
    run = await insert(ledger)
    await write(ledger, run, 1, 0, "first")
    async with aclosing(run_log.blocks(operations_on(ledger).context, run, follow=True)) as found:
        first = await anext(found)
        assert texts(first) == ["first"]
        waiting = asyncio.create_task(anext(found))
        await write(ledger, run, 1, 1, "second")
        second = await asyncio.wait_for(waiting, 10)
        assert texts(second) == ["second"]
        await write(ledger, run, 1, 2, "last")
        await end(ledger, "failed")
        rest = [block async for block in found]
    assert [texts(block) for block in rest[:-1]] == [["last"]]
    assert rest[-1] == "failed"


async def test_lines_that_come_with_the_end_of_the_run_are_not_lost(
    ledger: Database, ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEDGER_URL", ledger_url)
    run = await insert(ledger)
    state = run_log._state

    async def just_ended(*given: Any) -> tuple[str, int]:
        await write(ledger, run, 1, 0, "last")
        await end(ledger)
        return await state(*given)

    monkeypatch.setattr(run_log, "_state", just_ended)
    async with aclosing(run_log.blocks(operations_on(ledger).context, run, follow=True)) as found:
        block, last = [block async for block in found]
    assert (texts(block), last) == (["last"], "succeeded")


async def test_a_run_that_is_deleted_while_it_is_followed_is_named(
    ledger: Database, ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEDGER_URL", ledger_url)
    monkeypatch.setattr(run_log, "POLL_SECONDS", 0.01)
    run = await insert(ledger)
    await write(ledger, run, 1, 0, "first")
    async with aclosing(run_log.blocks(operations_on(ledger).context, run, follow=True)) as found:
        await anext(found)
        async with ledger.engine.begin() as connection:
            await connection.execute(tables.runs.delete())
        with pytest.raises(UnknownRun, match=run):
            await anext(found)


@pytest.mark.parametrize(("state", "code"), [("succeeded", 0), ("failed", 1), ("cancelled", 1)])
async def test_the_exit_code_of_following_is_how_the_run_ended(
    batch: Batch, prepared: Database, state: str, code: int
) -> None:
    run = await insert(prepared)
    await end(prepared, state)
    assert (await asyncio.to_thread(batch, "logs", run, "--follow")).code == code
    assert (await asyncio.to_thread(batch, "logs", run)).code == 0


async def test_following_ends_with_one_line_at_ctrl_c(prepared: Database, tmp_path: Path) -> None:
    run = await insert(prepared)
    await write(prepared, run, 1, 0, "first")

    def follow() -> tuple[int, str, str]:
        with process(tmp_path, [*BATCH, "logs", run, "--follow"]) as started:
            give_up_at = time.monotonic() + 20
            while "first" not in started.stdout:
                assert time.monotonic() < give_up_at, started.stderr
                time.sleep(0.02)
            started.stop(signal.SIGINT)
            return started.process.returncode, started.stdout, started.stderr

    code, out, err = await asyncio.to_thread(follow)
    assert (code, err) == (130, "batch: ended by Ctrl-C\n")
    assert out.count("\n") == 1


async def test_a_reader_that_goes_away_ends_logs_quietly(
    prepared: Database, tmp_path: Path
) -> None:
    run = await insert(prepared)
    for number in range(30):
        await write(
            prepared, run, 1, number * 100, *(f"{number} {n} {'x' * 500}" for n in range(100))
        )
    done = await asyncio.to_thread(
        subprocess.run,
        ["sh", "-c", f"{' '.join(BATCH)} logs {run} | head -1"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


async def test_ids_are_found_by_their_first_digits_in_order(ledger: Database) -> None:
    for id in (ONE, TWO):
        await insert(ledger, id=id)
    async with ledger.reader.connect() as connection:
        assert [r["id"] for r in await run_ids.begin_with(connection, "01a212", 5)] == [TWO, ONE]
        assert [r["id"] for r in await run_ids.begin_with(connection, "01a212", 1)] == [TWO]
        assert await run_ids.begin_with(connection, "01a213", 5) == []
        assert await runs.latest(connection, "flaky") == TWO
