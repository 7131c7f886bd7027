"""`batch account`, in processes of its own, on the ledger that a real service wrote."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from batch_system import cli, clock
from batch_system.batch.ledger import tables
from batch_system.database.engine import Database
from tests.batch.ledger_world import know, make_task
from tests.processes import BATCH, batch, environment, service

TICK = """
from batch_system import BaseTask

class Tick(BaseTask):
    name, schedule, overlap = "tick", "{cron}", "allow"
    async def run(self): ...

class Never(BaseTask):
    name, schedule = "by_hand", None
    async def run(self): ...
"""
EVERY_SECOND = "* * * * * *"
EVERY_OTHER = "*/2 * * * * *"
AT = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ"
COMPLETE = rf"every slot of 1 task between {AT} and {AT} is accounted for"

Done = subprocess.CompletedProcess[str]


def write(folder: Path, cron: str = EVERY_SECOND) -> None:
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks" / "tick.py").write_text(TICK.format(cron=cron))


def sql(folder: Path, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(folder / "ledger.db", timeout=10)) as connection, connection:
        return connection.execute(statement, values).fetchall()


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.05)


def run_until(folder: Path, number: int) -> None:
    """Run a service until there are this many runs."""
    with service(folder) as started:
        until(lambda: sql(folder, "SELECT count(*) FROM batch_runs")[0][0] >= number)
        started.stop()


def lines(done: Done) -> list[str]:
    return done.stdout.splitlines()


def last_line(done: Done) -> str:
    assert done.stderr == ""
    return lines(done)[-1]


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where a service with a task of every second has been for a while, and has
    stopped.
    """
    folder = tmp_path_factory.mktemp("lived")
    write(folder)
    run_until(folder, 4)
    return folder


@pytest.fixture
def folder(lived: Path, tmp_path: Path) -> Path:
    """The same, for one test to damage. Slots that came due since the service stopped do not matter
    to it.
    """
    with (
        closing(sqlite3.connect(lived / "ledger.db")) as old,
        closing(sqlite3.connect(tmp_path / "ledger.db")) as new,
    ):
        old.backup(new)
    write(tmp_path)
    return tmp_path


def stopped_at(folder: Path) -> str:
    """The newest slot, as `--until` takes it."""
    return str(sql(folder, "SELECT max(slot) FROM batch_runs")[0][0]) + "+00:00"


def account(folder: Path, *words: str) -> Done:
    return batch(folder, "account", "--until", stopped_at(folder), *words)


def shown(slot: str) -> str:
    return slot[:19] + "Z"


def test_a_service_that_lived_leaves_a_complete_account(folder: Path) -> None:
    done = account(folder)
    assert done.returncode == 0, done
    head, row, end = lines(done)
    number = str(len(sql(folder, "SELECT 1 FROM batch_runs")))
    assert head.split() == ["task", "since", "slots", "runs", "skipped", "missed", "due", "gaps"]
    assert re.split(r"  +", row)[0] == "tick" and re.split(r"  +", row)[2:] == [
        number,
        number,
        "0",
        "0",
        "0",
        "0",
    ]
    assert re.fullmatch(COMPLETE, end)


def test_what_came_due_while_nothing_runs_is_due_and_no_gap(folder: Path) -> None:
    """This holds even if the stopped service was killed, as long as no node was seen for a
    lease.
    """
    sql(folder, "UPDATE batch_nodes SET stopped_at = NULL, seen_at = '2000-01-01 00:00:00.000000'")
    stopped = str(datetime.now(UTC) - timedelta(seconds=100))[:26]
    sql(folder, "UPDATE batch_schedules SET valid_from = ?, fired_until = ?", stopped, stopped)
    sql(folder, "UPDATE batch_tasks SET accounted_from = ? WHERE name = 'tick'", stopped)
    sql(folder, "DELETE FROM batch_runs")
    done = batch(folder, "account")
    assert done.returncode == 0, done
    (due,) = (line for line in lines(done) if line.startswith("DUE tick "))
    text = "not handled yet; a service handles it when it next fires or starts"
    assert re.fullmatch(rf"DUE tick {AT} to {AT}: 1\d\d slots: {text}", due)
    assert re.fullmatch(COMPLETE + r"; 1\d\d are due and not handled yet", last_line(done))


def test_a_row_that_was_deleted_by_hand_is_a_gap_and_exit_code_1(folder: Path) -> None:
    slot = sql(folder, "SELECT slot FROM batch_runs ORDER BY slot LIMIT 1 OFFSET 1")[0][0]
    sql(folder, "DELETE FROM batch_runs WHERE slot = ?", slot)
    done = account(folder)
    assert done.returncode == 1
    assert f"GAP tick {shown(slot)}: no run, no skip, no missed range" in lines(done)
    assert last_line(done) == "1 slot is not accounted for"


def test_a_cursor_that_was_moved_by_hand_leaves_a_gap_after_the_next_start(folder: Path) -> None:
    """The service would have caught up; so it passes over what came due meanwhile."""
    runs = len(sql(folder, "SELECT 1 FROM batch_runs"))
    moved = str(datetime.now(UTC) + timedelta(seconds=2))[:26]
    sql(folder, "UPDATE batch_schedules SET fired_until = ?", moved)
    run_until(folder, runs + 2)
    done = account(folder)
    assert done.returncode == 1
    gaps = [line for line in lines(done) if line.startswith("GAP tick ")]
    assert len(gaps) == 1 and re.fullmatch(
        rf"GAP tick {AT} to {AT}: \d+ slots: no run, no skip, no missed range", gaps[0]
    )
    assert re.fullmatch(r"\d+ slots are not accounted for", last_line(done))


def test_two_services_with_different_schedules_leave_a_complete_account(tmp_path: Path) -> None:
    """A rolling deploy: the new code joins, the old one goes, and a third comes with the first
    schedule.
    """
    write(tmp_path)
    with service(tmp_path) as old:
        until(lambda: sql(tmp_path, "SELECT count(*) FROM batch_runs")[0][0] >= 2)
        write(tmp_path, EVERY_OTHER)
        with service(tmp_path) as new:
            runs = sql(tmp_path, "SELECT count(*) FROM batch_runs")[0][0]
            until(lambda: sql(tmp_path, "SELECT count(*) FROM batch_runs")[0][0] >= runs + 2)
            beside = batch(tmp_path, "account")
            old.stop()
            new.stop()
    write(tmp_path)
    run_until(tmp_path, runs + 4)
    done = account(tmp_path)
    assert (beside.returncode, done.returncode) == (0, 0), (beside, done)
    assert re.fullmatch(COMPLETE, last_line(done))
    assert len(sql(tmp_path, "SELECT 1 FROM batch_schedules")) == 3


def test_slots_are_listed_each_with_what_became_of_it(folder: Path) -> None:
    (first, _), (second, lost), *_ = sql(folder, "SELECT id, slot FROM batch_runs ORDER BY slot")
    sql(folder, "DELETE FROM batch_runs WHERE id = ?", second)
    done = account(folder, "--slots")
    listed = lines(done)
    assert re.fullmatch(rf"tick  {AT}  run {first} succeeded", listed[0])
    assert listed[1] == f"tick  {shown(lost)}  GAP: no run, no skip, no missed range"
    assert done.returncode == 1


def test_json_has_the_accounts_or_with_slots_each_slot(folder: Path) -> None:
    slot = sql(folder, "SELECT slot FROM batch_runs ORDER BY slot LIMIT 1 OFFSET 1")[0][0]
    sql(folder, "DELETE FROM batch_runs WHERE slot = ?", slot)
    instant = datetime.fromisoformat(slot).replace(tzinfo=UTC).isoformat().replace("+00:00", "Z")
    (found,) = json.loads(account(folder, "--json").stdout)
    text = "no run, no skip, no missed range"
    assert found["findings"] == [
        {"kind": "gap", "first": instant, "last": instant, "count": 1, "text": text}
    ]
    assert (found["task"], found["gaps"], found["complete"]) == ("tick", 1, False)
    slots = json.loads(account(folder, "--json", "--slots").stdout)
    assert len(slots) == found["slots"]
    assert slots[1] == {
        "task": "tick",
        "slot": instant,
        "kind": "gap",
        "run": None,
        "state": None,
        "reason": None,
    }
    assert (slots[0]["kind"], slots[0]["state"]) == ("run", "succeeded")


def test_a_task_of_another_name_is_refused_and_one_without_slots_has_none(folder: Path) -> None:
    unknown = batch(folder, "account", "--task", "tock")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "the ledger knows no task 'tock'" in unknown.stderr
    by_hand = batch(folder, "account", "--task", "by_hand")
    assert by_hand.returncode == 0
    assert re.fullmatch(rf"no task had a schedule between {AT} and {AT}", last_line(by_hand))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--since", "soon"], "--since is 'soon'; allowed: ISO 8601"),
        (["--until", "soon"], "--until is 'soon'; allowed: ISO 8601"),
        (
            ["--since", "1h", "--until", "2h"],
            "--since is '1h'; allowed: an instant before --until 2h",
        ),
        (["--since", "9000-01-01"], "--since is '9000-01-01'; allowed: "),
        (["--since", "2999-01-01"], "--since is '2999-01-01'; allowed: an instant before now"),
    ],
)
def test_an_invalid_interval_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["batch", "account", *words])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    out, err = capsys.readouterr()
    assert (exited.value.code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"batch: {said}")


@pytest.mark.first_start
def test_without_a_ledger_there_is_nothing_to_account_for_and_none_is_made(tmp_path: Path) -> None:
    done = batch(tmp_path, "account")
    assert done.returncode == 0 and last_line(done).startswith("no task had a schedule between ")
    assert json.loads(batch(tmp_path, "account", "--json", "--slots").stdout) == []
    assert not (tmp_path / "ledger.db").exists()


async def test_it_reads_either_database(ledger: Database, tmp_path: Path) -> None:
    """A cursor that was moved over an hour of slots."""
    await know(ledger, make_task("tick"))
    now = clock.now()
    async with ledger.engine.begin() as connection:
        an_hour_ago = now - timedelta(hours=1)
        await connection.execute(
            update(tables.schedules).values(valid_from=an_hour_ago, fired_until=now)
        )
        await connection.execute(update(tables.tasks).values(accounted_from=an_hour_ago))
    settings = {"LEDGER_URL": ledger.url.render_as_string(hide_password=False)}
    done = await asyncio.to_thread(batch, tmp_path, "account", settings=settings)
    assert (done.returncode, last_line(done)) == (1, "60 slots are not accounted for")


def test_a_reader_that_has_seen_enough_is_no_error(folder: Path) -> None:
    """`batch account --slots | head -1`, with more slots than a pipe holds."""
    sql(
        folder,
        "UPDATE batch_schedules SET valid_from = datetime(valid_from, '-3 hours') || '.000000'",
    )
    sql(folder, "UPDATE batch_tasks SET accounted_from = NULL")
    process = subprocess.Popen(
        [*BATCH, "account", "--slots"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith(b"tick  ")
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(30) == 1
