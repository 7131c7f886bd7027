"""The `batch` command: what each command prints, and how it answers bad input."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import re
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from batch_system import TaskRegistry, clock
from batch_system.batch.firing import pauses, task_sync
from batch_system.batch.ledger import database_time, runs, tables
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.runs import NewRun
from batch_system.cli.hints import NO_SERVICE
from batch_system.cli.runs import COLUMNS
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from tests.commands import Batch, Done, in_this_process, refuses
from tests.migrations import APPLICATION_HISTORIES
from tests.processes import BATCH, environment

RUN = [
    "id",
    "task",
    "slot",
    "origin",
    "state",
    "reason",
    "attempt",
    "node",
    "created_at",
    "started_at",
    "finished_at",
]
RUN += [
    "attempt_started_at",
    "gate",
    "count",
    "total",
    "message",
    "rate",
    "progress_at",
    "eta",
    "fingerprint",
    "quarantined",
]
TASK = ["name", "description", "schedule", "given", "timezone", "next_run_time", "paused", "source"]
TASK += [
    "served_from",
    "words",
    "pool",
    "memory",
    "tags",
    "failure_streak",
    "last_success_at",
    "p50",
    "p95",
    "error",
]
HINT = f"batch: {NO_SERVICE}\n"

REPORT = '''
from datetime import date
from batch_system import BaseTask, DomainError, current_run, get_logger

class Report(BaseTask):
    """Count what happened."""
    name, schedule, timezone = "report", "0 1 * * *", "Asia/Tokyo"
    async def run(self, day: date = date(2026, 1, 1), fail: bool = False):
        get_logger(__name__).info(f"counting {day}")
        if fail:
            raise DomainError("there is nothing to count")
        return {"day": day.isoformat(), "slot": current_run().slot.isoformat()}
'''


@pytest.fixture
def batch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    yield from in_this_process(capsys, monkeypatch)


@pytest.fixture
def report(tmp_path: Path) -> None:
    (tmp_path / "tasks" / "report.py").write_text(REPORT)


# next


def test_next_shows_slots_in_utc_and_in_the_zone(batch: Batch) -> None:
    done = batch("next", "30 9 * * *", "--tz", "Asia/Tokyo", "--after", "2026-11-25", "-n", "2")
    assert done.code == 0
    assert done.out.splitlines()[1:] == [
        "slot                  local",
        "2026-11-25 00:30:00Z  2026-11-25 09:30:00+09:00",
        "2026-11-26 00:30:00Z  2026-11-26 09:30:00+09:00",
    ]


def test_next_says_first_what_the_expression_means(batch: Batch) -> None:
    assert batch("next", "30 9 * * *").out.splitlines()[0] == "At 09:30 every day"


def test_next_as_json_is_nothing_but_an_array(batch: Batch) -> None:
    found = batch("next", "@daily", "--after", "2026-11-25T12:00+09:00", "-n", "1", "--json").json
    assert found == [{"slot": "2026-11-26T00:00:00Z", "local": "2026-11-26T00:00:00Z"}]


def test_next_is_after_now_and_five_slots_long_by_default(batch: Batch) -> None:
    found = [
        datetime.fromisoformat(row["slot"]) for row in batch("next", "* * * * *", "--json").json
    ]
    assert len(found) == 5
    assert clock.now() - timedelta(seconds=5) < found[0] < clock.now() + timedelta(minutes=1)


def test_after_without_an_offset_is_in_the_zone(batch: Batch) -> None:
    done = batch(
        "next",
        "0 0 * * *",
        "--tz",
        "Asia/Tokyo",
        "--after",
        "2026-11-25T23:59",
        "-n",
        "1",
        "--json",
    )
    assert done.json[0]["local"] == "2026-11-26T00:00:00+09:00"


# tasks


@pytest.mark.first_start
def test_tasks_lists_what_is_there_without_making_a_ledger(
    batch: Batch, report: None, tmp_path: Path
) -> None:
    (row,) = batch("tasks", "--json").json
    assert list(row) == TASK
    following = datetime.fromisoformat(row.pop("next_run_time"))
    assert following > clock.now() and following.astimezone(UTC).hour == 16
    assert row == {
        "name": "report",
        "description": "Count what happened.",
        "schedule": "0 1 * * *",
        "given": None,
        "timezone": "Asia/Tokyo",
        "paused": False,
        "source": "tasks/report.py",
        "served_from": None,
        "words": "At 01:00 every day (Asia/Tokyo)",
        "pool": "default",
        "memory": None,
        "tags": [],
        "failure_streak": 0,
        "last_success_at": None,
        "p50": None,
        "p95": None,
        "error": None,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tasks"]


def test_tasks_in_plain_columns(batch: Batch, report: None) -> None:
    heading, row = batch("tasks").out.splitlines()
    assert heading.split() == ["name", "schedule", "timezone", "next_run_time", "source"]
    assert re.fullmatch(
        r"report +0 1 \* \* \* +Asia/Tokyo +\d{4}-\d\d-\d\d 16:00:00Z +tasks/report\.py", row
    )


def test_tasks_has_a_file_that_does_not_import_on_stderr_and_in_json(
    batch: Batch, report: None, tmp_path: Path
) -> None:
    (tmp_path / "tasks" / "broken.py").write_text("import nowhere\n")
    done = batch("tasks")
    assert done.code == 1
    assert len(done.out.splitlines()) == 2
    assert done.err == (
        "batch: tasks/broken.py can't be used: ModuleNotFoundError in line 1: No module named "
        "'nowhere'\n" + HINT
    )
    good, bad = batch("tasks", "--json").json
    assert good["error"] is None and list(bad) == TASK
    assert (bad["name"], bad["source"]) == (None, "tasks/broken.py")
    assert bad["error"] == "ModuleNotFoundError in line 1: No module named 'nowhere'"


def test_tasks_says_which_files_have_the_same_name(
    batch: Batch, report: None, tmp_path: Path
) -> None:
    (tmp_path / "tasks" / "same.py").write_text(REPORT.replace("Report", "Same"))
    done = batch("tasks")
    assert done.code == 1
    told = done.err.removesuffix(HINT)
    assert re.fullmatch(
        r"batch: tasks/same\.py can't be used: .*'report'.*tasks/report\.py.*tasks/same\.py.*\n",
        told,
    )
    assert "report" in done.out


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        ('"0 1 * * *"', '"0 25 * * *"', ["'0 25 * * *'", "hour", "0-23"]),
        ('"Asia/Tokyo"', '"Mars/Olympus"', ["'Mars/Olympus'", "IANA"]),
        ('"report"', '"Daily Report"', ["'Daily Report'", "allowed"]),
    ],
)
def test_tasks_names_class_and_file_of_a_bad_task(
    batch: Batch, tmp_path: Path, was: str, now: str, words: list[str]
) -> None:
    (tmp_path / "tasks" / "report.py").write_text(REPORT.replace(was, now))
    done = batch("tasks")
    assert done.code == 1
    (line,) = done.err.removesuffix(HINT).splitlines()
    assert all(word in line for word in ["Report", "tasks/report.py", *words]), line


def test_a_paused_task_has_no_next_run_time(batch: Batch, report: None) -> None:
    assert batch("run", "report").code == 0

    async def pause() -> None:
        async with Database(
            "sqlite+aiosqlite:///ledger.db", setting="LEDGER_URL", pooled=False
        ).engine.begin() as c:
            loaded = TaskRegistry.tasks()
            await task_sync.set_schedules(
                c, {"report": loaded["report"].schedule}, loaded, tables.new_id()
            )
            await pauses.pause(c, "report", "ann", loaded, tables.new_id())

    asyncio.run(pause())
    (row,) = batch("tasks", "--json").json
    assert (row["paused"], row["next_run_time"], row["schedule"]) == (True, None, "0 1 * * *")


# run, and runs


def test_run_executes_here_shows_the_log_and_prints_the_result(
    batch: Batch, report: None, database_url: str
) -> None:
    done = batch(
        "run",
        "report",
        "--param",
        "day=2026-02-03",
        "--slot",
        "2026-02-04",
        LEDGER_URL=database_url,
    )
    assert done.code == 0
    told, result = done.out.splitlines()
    assert re.fullmatch(r"run [0-9a-f-]{36} succeeded in \d+\.\d\d s", told)
    assert json.loads(result) == {"day": "2026-02-03", "slot": "2026-02-04T09:00:00+09:00"}
    assert "counting 2026-02-03" in done.err
    (row,) = batch("runs", "--json").json
    assert list(row) == RUN
    assert (row["id"], row["task"], row["origin"], row["state"]) == (
        told.split()[1],
        "report",
        "manual",
        "succeeded",
    )
    assert (row["slot"], row["attempt"], row["reason"]) == ("2026-02-04T00:00:00Z", 1, None)
    assert row["created_at"] <= row["started_at"] <= row["finished_at"]
    assert row["created_at"].endswith("Z")


@pytest.mark.parametrize("serves", ["", "nodes"])
def test_run_refuses_a_task_of_a_pool_of_other_processes(
    batch: Batch, report: None, tmp_path: Path, serves: str
) -> None:
    of_pool = REPORT.replace(
        "name, schedule, timezone =", 'pool = "gpu"\n    name, schedule, timezone ='
    )
    (tmp_path / "tasks" / "report.py").write_text(of_pool)
    done = batch("run", "report", BATCH_POOL_GPU=serves)
    refuses(done, "report", "pool gpu", "`batch work --pool gpu`", "`batch run report --queue`")
    assert batch("runs", "--json").json == []
    assert batch("run", "report", "--queue", "--note", "it was wrong").code == 0
    (change,) = batch("changes", "--action", "run.start", "--json").json
    assert change["note"] == "it was wrong"


@pytest.mark.rest
def test_run_of_a_failing_task_is_recorded_and_ends_with_code_1(
    batch: Batch, report: None, database_url: str
) -> None:
    done = batch("run", "report", "--param", "fail=yes", LEDGER_URL=database_url)
    assert done.code == 1
    assert re.fullmatch(
        r"run \S+ failed in \d+\.\d\d s: DomainError: there is nothing to count\n", done.out
    )
    (row,) = batch("runs", "--state", "failed", "--json").json
    assert row["reason"] == "DomainError: there is nothing to count"


def test_run_writes_down_who_asked_for_it(
    batch: Batch, report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    batch("run", "report", LOGNAME="ann")
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert batch("run", "report").code == 0
    with closing(sqlite3.connect("ledger.db")) as ledger:
        asked = [
            row[0]
            for row in ledger.execute("SELECT requested_by FROM batch_runs ORDER BY created_at")
        ]
    assert asked == ["ann", f"user {os.getuid()}"]


@pytest.fixture
async def history(database_url: str) -> str:
    """A ledger with 30 runs, one a minute, the last of them now; every third one failed."""
    ledger = Database(database_url, setting="LEDGER_URL")
    await migrate(ledger, LEDGER_HISTORY)
    now = clock.now()
    new = []
    for n in range(30):
        at = now - timedelta(minutes=29 - n)
        new.append(
            NewRun(
                id=tables.new_id(),
                task="even" if n % 2 == 0 else "odd",
                slot=at,
                origin="schedule",
                state="failed" if n % 3 == 0 else "succeeded",
                rank=1,
                catch_up=False,
                due_at=at,
                created_at=at,
            )
        )
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, new)
        names = [
            {"name": name, "description": "", "source": "", "policies": {}}
            for name in ("even", "odd")
        ]
        seen = {"first_seen_at": await database_time.now_of(connection), "last_seen_at": now}
        await connection.execute(tables.tasks.insert(), [{**name, **seen} for name in names])
    await ledger.dispose()
    return database_url


@pytest.mark.rest
def test_runs_are_listed_newest_first_and_can_be_narrowed_down(batch: Batch, history: str) -> None:
    all_of_them = batch("runs", "--json", LEDGER_URL=history).json
    created = [row["created_at"] for row in all_of_them]
    assert len(created) == 30 and created == sorted(created, reverse=True)
    assert len(batch("runs", "--json", "--limit", "7").json) == 7
    assert batch("runs", "--json", "--limit", "7").json == all_of_them[:7]
    assert batch("runs", "--json", "--task", "odd").json == [
        row for row in all_of_them if row["task"] == "odd"
    ]
    assert batch("runs", "--json", "--state", "failed").json == [
        r for r in all_of_them if r["state"] == "failed"
    ]
    assert batch("runs", "--json", "--since", "330s").json == all_of_them[:6]
    assert batch("runs", "--json", "--since", created[3]).json == all_of_them[:4]
    assert batch("runs", "--json", "--since", "1d", "--state", "cancelled").json == []


def test_runs_in_plain_columns(batch: Batch, history: str) -> None:
    done = batch("runs", "--limit", "1", LEDGER_URL=history)
    heading, row = done.out.splitlines()
    assert heading.split() == [*COLUMNS, "reason"]
    assert re.fullmatch(
        r"[0-9a-f]{8}  odd   \d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ  schedule  succeeded  .*", row
    )
    assert done.err == HINT


@pytest.mark.first_start
def test_runs_of_a_folder_without_a_ledger_are_none_and_none_is_made(
    batch: Batch, tmp_path: Path
) -> None:
    assert batch("runs", "--json") == Done(0, "[]\n", "")
    assert not (tmp_path / "ledger.db").exists()


# Bad input: one line that says what was wrong and what is allowed.


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["next", "61 * * * *"], ["'61 * * * *'", "minute", "0-59"]),
        (["next", "* * *"], ["'* * *'", "five"]),
        (["next", "0 0 31 2 *"], ["'0 0 31 2 *'", "never"]),
        (["next", "* * * * *", "--tz", "Mars"], ["'Mars'", "Europe/Berlin"]),
        (["next", "* * * * *", "--after", "soon"], ["--after", "'soon'", "ISO 8601"]),
        (["next", "* * * * *", "--after", ""], ["--after", "''", "ISO 8601"]),
        (
            ["next", "* * * * *", "--after", "0001-01-01T00:00+14:00"],
            ["--after", "0001", "ISO 8601"],
        ),
        (["next", "* * * * *", "-n", "0"], ["-n", "1"]),
        (["next"], ["expression"]),
        (["runs", "--state", "done"], ["'done'", "queued", "succeeded", "skipped"]),
        (["runs", "--task", "nope"], ["'nope'", "none"]),
        (["runs", "--since", "yesterday"], ["--since", "'yesterday'", "ISO 8601", "7d"]),
        (["runs", "--since", ""], ["--since", "''", "ISO 8601"]),
        (["runs", "--since", "99999999999d"], ["--since", "'99999999999d'"]),
        (["runs", "--since", "9999-12-31T23:59-14:00"], ["--since", "9999", "ISO 8601"]),
        (["runs", "--limit", "0"], ["--limit", "1"]),
        (["runs", "--limit", "many"], ["--limit", "whole number"]),
        (["run", "report", "--slot", "noon"], ["--slot", "'noon'", "ISO 8601"]),
        (["run", "report", "--slot", ""], ["--slot", "''", "ISO 8601"]),
        (["run", "report", "--slot", "9999-12-31T23:59-14:00"], ["--slot", "9999", "ISO 8601"]),
        (["run", "report", "--param", "day"], ["--param", "'day'", "name=value"]),
        (
            ["run", "report", "--param", "day=2026-01-01", "--param", "day=2026-01-02"],
            ["day", "twice"],
        ),
        (["run", "report", "--param", "day=soon"], ["report", "day", "'soon'", "date"]),
        (["run", "report", "--param", "days=1"], ["report", "'days'", "day, fail"]),
        (["run", "nope"], ["'nope'", "report"]),
        (["run"], ["name"]),
        (["serve", "--port", "99999"], ["--port", "65,535"]),
        (["serve", "--host", "nowhere.invalid"], ["nowhere.invalid", "HOST"]),
        (["serve", "--host", "a..b"], ["a..b", "HOST"]),
        (["work"], ["--pool"]),
        (["work", "--pool", "GPU"], ["--pool", "'GPU'", "a-z 0-9 _"]),
        (["work", "--pool", "gpu", "--max-running", "0"], ["--max-running", "from 1"]),
        (["work", "--pool", "gpu", "--host", "127.0.0.1"], ["--host", "--port"]),
        (["work", "--pool", "gpu", "--port", "99999"], ["--port", "65,535"]),
        (
            ["--url", "http://127.0.0.1:1", "work", "--pool", "gpu"],
            ["`batch work`", "without --url"],
        ),
        (["fly"], ["'fly'"]),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_refused_in_one_line(
    batch: Batch, report: None, words: list[str], named: list[str]
) -> None:
    refuses(batch(*words), *named)


@pytest.mark.parametrize("command", ["serve", "tasks", "runs", "run report"])
@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("PORT", "http", ["integer", "'http'"]),
        ("LOG_LEVEL", "loud", ["'DEBUG', 'INFO', 'WARNING', 'ERROR' or 'CRITICAL'", "'loud'"]),
        ("MAX_RUNNING", "0", ["1", "'0'"]),
        ("DATABASE_URL", "app.db", ["sqlite:///./app.db"]),
    ],
)
def test_a_bad_setting_is_refused_in_one_line(
    batch: Batch, report: None, command: str, setting: str, value: str, named: list[str]
) -> None:
    refuses(batch(*command.split(), **{setting: value}), f"setting {setting}", *named)


@pytest.mark.parametrize("command", ["serve", "tasks", "run report"])
def test_a_missing_tasks_folder_is_refused_in_one_line(batch: Batch, command: str) -> None:
    refuses(batch(*command.split(), TASKS_DIR="jobs", PORT="0"), "TASKS_DIR", "'jobs'")


@pytest.mark.parametrize("command", ["serve", "run report", "runs", "tasks"])
def test_an_unreachable_ledger_is_named_without_its_password(
    batch: Batch, report: None, command: str
) -> None:
    done = batch(*command.split(), LEDGER_URL="postgresql://bob:hunter2@127.0.0.1:1/shop", PORT="0")
    refuses(done, "bob:***@127.0.0.1:1/shop", "LEDGER_URL", code=3)
    assert "hunter2" not in done.err


def test_an_unreachable_ledger_is_named_by_the_setting_that_says_where_it_is(
    batch: Batch, report: None
) -> None:
    done = batch("runs", DATABASE_URL="postgresql://bob@127.0.0.1:1/shop")
    refuses(done, "bob@127.0.0.1:1/shop", "Look at DATABASE_URL", code=3)
    assert "LEDGER_URL" not in done.err


@pytest.mark.parametrize("command", ["serve", "run report"])
def test_an_unreachable_application_database_is_named(
    batch: Batch, report: None, command: str
) -> None:
    done = batch(*command.split(), DATABASE_URL="sqlite:////nowhere/app.db", PORT="0")
    refuses(done, "/nowhere/app.db", "DATABASE_URL", code=3)


@pytest.mark.parametrize("command", ["serve", "run report"])
async def test_one_sqlite_file_for_both_is_refused(
    batch: Batch, report: None, command: str
) -> None:
    done = await asyncio.to_thread(batch, *command.split(), LEDGER_URL="sqlite:///app.db", PORT="0")
    refuses(done, "LEDGER_URL", "DATABASE_URL")


def test_a_ledger_in_a_folder_that_is_not_there_is_no_empty_ledger(
    batch: Batch, report: None
) -> None:
    refuses(
        batch("runs", LEDGER_URL="sqlite:////nowhere/ledger.db"),
        "/nowhere/ledger.db",
        "LEDGER_URL",
        code=3,
    )


def test_a_file_that_is_no_database_is_named(batch: Batch, report: None, tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_text("my notes, which nobody may lose\n" * 100)
    for words in (["serve"], ["runs"], ["run", "report"]):
        refuses(batch(*words, PORT="0"), "ledger.db", "not a database", "DATABASE_URL", code=3)
    assert (tmp_path / "ledger.db").read_text().startswith("my notes")


@pytest.fixture
async def newer(database_url: str) -> str:
    """A database that newer code has migrated so that this code can't work with it."""
    database = Database(database_url, setting="LEDGER_URL")
    await migrate(database, LEDGER_HISTORY)
    await migrate(database, *APPLICATION_HISTORIES)
    async with database.engine.begin() as connection:
        for table in ("batch_alembic_version", "alembic_version"):
            await connection.execute(text(f"UPDATE {table} SET version_num = 'from_the_future'"))
        for table in ("batch_windows", "batch_data_windows"):
            await connection.execute(text(f"UPDATE {table} SET oldest = 'from_the_future'"))
    await database.dispose()
    return database_url


@pytest.mark.rest
@pytest.mark.parametrize("setting", ["LEDGER_URL", "DATABASE_URL"])
@pytest.mark.parametrize("command", ["serve", "run report"])
def test_a_newer_database_is_refused_and_left_alone(
    batch: Batch, report: None, newer: str, setting: str, command: str
) -> None:
    settings = {"LEDGER_URL": "sqlite:///./ledger.db", setting: newer, "PORT": "0"}
    refuses(batch(*command.split(), **settings), setting, "from_the_future", "newer", code=3)


@pytest.mark.parametrize("command", ["runs", "tasks"])
def test_a_list_of_a_newer_ledger_is_refused(
    batch: Batch, report: None, newer: str, command: str
) -> None:
    refuses(batch(command, LEDGER_URL=newer), "LEDGER_URL", "from_the_future", "newer", code=3)


def test_the_slot_is_given_as_an_option_of_its_own(batch: Batch, report: None) -> None:
    refuses(batch("run", "report", "--param", "slot=2026-11-25T02:00+09:00"), "slot", "--slot")


@pytest.mark.first_start
def test_a_port_in_use_is_named(batch: Batch, report: None, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refuses(batch("serve", PORT=str(port)), f"port {port}", "in use", "PORT")
    assert not (tmp_path / "ledger.db").exists()


@pytest.mark.rest
def test_a_run_that_is_refused_leaves_no_run(batch: Batch, report: None) -> None:
    assert batch("run", "report").code == 0
    for words in (["nope"], ["report", "--param", "day=x"], ["report", "--slot", "x"]):
        assert batch("run", *words).code == 2
    assert len(batch("runs", "--json").json) == 1


@pytest.mark.rest
@pytest.mark.parametrize("read_only", ["ledger.db", "."])
def test_a_read_only_file_or_folder_is_named_and_loses_nothing(
    batch: Batch, report: None, tmp_path: Path, read_only: str
) -> None:
    assert batch("run", "report").code == 0
    for left in (*tmp_path.glob("*-wal"), *tmp_path.glob("*-shm")):
        left.unlink()
    place = tmp_path / read_only
    mode = place.stat().st_mode
    place.chmod(0o555 if place.is_dir() else 0o444)
    try:
        for words in (["serve"], ["run", "report"]):
            done = without_power(tmp_path, *words)
            refuses(
                done, "app.db" if read_only == "." else read_only, "can't be used", "_URL", code=3
            )
    finally:
        place.chmod(mode)
    assert len(batch("runs", "--json").json) == 1


def without_power(folder: Path, *words: str) -> Done:
    """The command in a process that file permissions apply to, even when root runs the tests."""
    powerless = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []
    command = [*powerless, *BATCH, *words]
    env = {**environment({"PORT": "0"}), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=30)
    return Done(done.returncode, done.stdout, done.stderr)


# The command itself.


def test_the_command_without_arguments_shows_its_help(batch: Batch) -> None:
    done = batch()
    assert done.code == 2 and done.err == ""
    assert all(command in done.out for command in ("serve", "tasks", "run", "runs", "next"))


def test_a_reader_that_goes_away_ends_the_command_quietly(tmp_path: Path) -> None:
    many = " ".join([*BATCH, "next", "'* * * * *'", "-n", "10000"])
    done = subprocess.run(
        ["sh", "-c", f"{many} | head -1"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout == "Every minute\n"
    assert done.stderr == ""


SLOW = """
import asyncio
from batch_system import BaseTask

class Slow(BaseTask):
    name = "slow"
    schedule = None

    async def run(self) -> None:
        open("begun", "w").close()
        await asyncio.Event().wait()
"""


@pytest.mark.rest
def test_a_run_by_hand_in_the_background_of_a_script_is_interrupted_by_sigterm(
    tmp_path: Path,
) -> None:
    """A shell without job control starts `batch run x &` with SIGINT ignored."""
    (tmp_path / "tasks/slow.py").write_text(SLOW)
    started = subprocess.Popen(
        [*BATCH, "run", "slow"],
        cwd=tmp_path,
        env=environment({"DRAIN_SECONDS": "0"}),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    while not (tmp_path / "begun").exists():
        assert started.poll() is None
        time.sleep(0.02)
    started.terminate()
    _, told = started.communicate(timeout=20)
    assert started.returncode == 128 + signal.SIGTERM and "Traceback" not in told
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as ledger:
        assert ledger.execute("SELECT state, reason FROM batch_runs").fetchall() == [
            ("interrupted", "the service stopped")
        ]
