"""`batch pause`, `resume`, `cancel`, `retry`, `backfill`, `prune`, `run --queue`: beside a service,
and without one.
"""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from batch_system import TaskRegistry, clock
from batch_system.batch.firing import pauses
from batch_system.batch.ledger import schedules, tables
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.states import Origin
from batch_system.batch.tasks.discovery import load_tasks
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.operations.slots import account
from tests.asking import operations_on
from tests.batch.ledger_world import fire, know, make_task, rows, until
from tests.batch.test_runs import insert, new
from tests.commands import Batch, in_this_process, refuses
from tests.processes import BATCH, process, service
from tests.processes import batch as command

TASKS = '''
import asyncio
import time
from batch_system import BaseTask, current_run, get_logger

class Long(BaseTask):
    """Goes on until it is stopped."""
    name, schedule = "long", None

    async def run(self) -> None:
        await asyncio.Event().wait()

class Sync(BaseTask):
    """The same in a thread."""
    name, schedule = "sync", None

    def run(self) -> None:
        while True:
            current_run().checkpoint()
            time.sleep(0.01)

class Tick(BaseTask):
    """Each hour."""
    name, schedule = "tick", "0 * * * *"

    async def run(self, fail: bool = False) -> str:
        get_logger("tick").info(f"this is {current_run().origin}")
        if fail:
            raise ValueError("as asked for")
        return "done"

class Often(BaseTask):
    name, schedule = "often", "* * * * * *"

    async def run(self) -> None: ...
'''
ID = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}")


@pytest.fixture
def batch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    monkeypatch.setenv("LOGNAME", "ann")
    yield from in_this_process(capsys, monkeypatch)


@pytest.fixture
def files(tmp_path: Path) -> None:
    (tmp_path / "tasks/all.py").write_text(TASKS)


def settings_of(ledger: Database) -> dict[str, str]:
    return {
        "LEDGER_URL": ledger.url.render_as_string(hide_password=False),
        "LOGNAME": "ann",
        "POLL_SECONDS": "0.2",
    }


def url_of(ledger: Database) -> str:
    return settings_of(ledger)["LEDGER_URL"]


async def call(batch: Batch, ledger: Database, *words: str) -> Any:
    return await asyncio.to_thread(batch, *words, LEDGER_URL=url_of(ledger))


# Beside a service: real processes.


async def test_a_run_in_another_process_is_cancelled_within_two_seconds(
    ledger: Database, tmp_path: Path, files: None, batch: Batch
) -> None:
    with service(tmp_path, settings=settings_of(ledger)) as running:
        for name in ("long", "sync"):
            took = [await seconds_to_cancel(ledger, batch, name)]
            # The machine may be busy with something else just then.
            while took[-1] >= 2 and len(took) < 3:
                took.append(await seconds_to_cancel(ledger, batch, name))
            assert min(took) < 2
        running.stop()


async def seconds_to_cancel(ledger: Database, batch: Batch, name: str) -> float:
    """From the command to the end of a run of this task."""
    queued = await call(batch, ledger, "run", name, "--queue")
    run = ID.findall(queued.out)[0]
    await until(lambda: rows(ledger, id=run, state="running"))
    done = await call(batch, ledger, "cancel", run)
    assert (done.code, done.out) == (0, f"run {run} cancelled: cancelled by ann\n")
    (row,) = await rows(ledger, id=run)
    assert (row["state"], row["reason"]) == ("cancelled", "cancelled by ann")
    return float((row["finished_at"] - row["cancel_at"]).total_seconds())


async def test_a_command_that_waits_for_the_lock_of_the_ledger_says_who_holds_it(
    tmp_path: Path,
) -> None:
    ledger = Database(
        f"sqlite+aiosqlite:///{tmp_path}/ledger.db", setting="LEDGER_URL", pooled=False
    )
    await migrate(ledger, LEDGER_HISTORY)
    with closing(sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with process(tmp_path, [*BATCH, "pause", "nobody"], settings_of(ledger)) as waiting:
            said = f"waiting for the ledger's lock, held by pid {os.getpid()}\n"
            await until(lambda: asyncio.sleep(0, waiting.stderr.endswith(said)))
            holder.execute("ROLLBACK")
            assert await asyncio.to_thread(waiting.process.wait, 30) == 2
            assert waiting.stderr.count("waiting for") == 1


@pytest.mark.parametrize("ledger_url", ["postgresql"], indirect=True)
async def test_a_queued_run_is_run_by_the_service_and_followed(
    ledger: Database, tmp_path: Path, files: None, batch: Batch
) -> None:
    with service(tmp_path, settings=settings_of(ledger)):
        done = await call(batch, ledger, "run", "tick", "--queue", "--wait")
        assert done.code == 0 and "this is manual" in done.out and done.err == ""
        run = ID.findall(done.out)[0]
        assert re.fullmatch(rf"run {run} succeeded in \d+\.\d\d s", done.out.splitlines()[-2])
        assert done.out.splitlines()[-1] == '"done"'
        as_json = await call(batch, ledger, "run", "tick", "--queue", "--wait", "--json")
        assert (as_json.json["state"], as_json.json["result"]) == ("succeeded", "done")
        assert "this is manual" in as_json.err
        (row,) = await rows(ledger, id=run)
        assert (row["state"], row["result"], row["requested_by"]) == ("succeeded", "done", "ann")
        failed = await call(
            batch, ledger, "run", "tick", "--queue", "--wait", "--param", "fail=true"
        )
        assert failed.code == 1
        assert re.search(
            r"^run \S+ failed in \d+\.\d\d s: ValueError: as asked for$", failed.out, re.MULTILINE
        )
        lost = ID.findall(failed.out)[0]
        assert (await call(batch, ledger, "retry", lost)).code == 0
        (again,) = await until(lambda: rows(ledger, id=lost, state="failed", attempt=2))
        assert [a["number"] for a in await rows(ledger, tables.attempts, run=lost)] == [1, 2]
        assert again["fence"] == 2


@pytest.mark.parametrize("ledger_url", ["sqlite"], indirect=True)
async def test_a_task_is_paused_and_resumed_beside_a_service(
    ledger: Database, tmp_path: Path, files: None, batch: Batch
) -> None:
    with service(tmp_path, settings=settings_of(ledger)):
        await until(lambda: rows(ledger, task="often", state="succeeded"))
        paused = await call(batch, ledger, "pause", "often")
        assert (paused.code, paused.out) == (0, "often is paused by ann\n")
        (row,) = await rows(ledger, tables.tasks, name="often")
        await asyncio.sleep(2.2)
        late = [run for run in await rows(ledger, task="often") if run["slot"] > row["paused_at"]]
        assert late == []
        assert (await call(batch, ledger, "resume", "often")).code == 0
        resumed_at = clock.now()

        async def has_fired() -> bool:
            return any(run["slot"] > resumed_at for run in await rows(ledger, task="often"))

        await until(has_fired)
    (found,) = await _accounts(ledger, "often")
    assert found.complete and found.gaps == 0 and found.missed >= 2


async def _accounts(ledger: Database, task: str) -> Any:
    accounts = await account.accounts(
        operations_on(ledger).context, clock.now() - timedelta(days=2), task=task
    )
    return accounts.tasks


# Without one.


@pytest.fixture
async def started(tmp_path: Path, files: None, ledger: Database) -> None:
    """A service has been here: the tasks and their schedules are known."""
    load_tasks(tmp_path / "tasks")
    await know(ledger, *TaskRegistry.tasks().values())


async def test_pausing_twice_says_who_was_first_and_so_does_resuming(
    ledger: Database, batch: Batch, started: None
) -> None:
    assert (await call(batch, ledger, "pause", "tick")).out == "tick is paused by ann\n"
    assert re.fullmatch(
        r"tick was paused already, at .*Z by ann\n",
        (await call(batch, ledger, "pause", "tick")).out,
    )
    assert re.fullmatch(
        r"tick fires again; .* by ann\n", (await call(batch, ledger, "resume", "tick")).out
    )
    assert (await call(batch, ledger, "resume", "tick")).out == "tick is not paused\n"


async def test_a_pause_has_an_end_if_one_is_given(
    ledger: Database, batch: Batch, started: None
) -> None:
    refuses(
        await call(batch, ledger, "pause", "tick", "--until", "2026-01-01"), "an instant after now"
    )
    refuses(
        await call(batch, ledger, "pause", "tick", "--until", "2099-01-01", "--for", "2h"),
        "--for",
        "--until",
    )
    assert await rows(ledger, tables.tasks, name="tick", paused_at=None)
    done = await call(batch, ledger, "pause", "tick", "--until", "2099-01-01T06:00+01:00")
    assert done.out == "tick is paused by ann, until 2099-01-01 05:00:00Z\n"
    assert ", until 2099-01-01 05:00:00Z" in (await call(batch, ledger, "show", "tick")).out
    assert ", until " in (await call(batch, ledger, "pause", "tick", "--for", "2h")).out
    (row,) = await rows(ledger, tables.tasks, name="tick")
    assert timedelta(minutes=119) < row["paused_until"] - row["paused_at"] < timedelta(minutes=121)
    await call(batch, ledger, "resume", "tick")
    assert await rows(ledger, tables.tasks, name="tick", paused_until=None)


async def test_many_tasks_are_paused_and_muted_by_one_command_and_ended_by_another(
    ledger: Database, batch: Batch, started: None
) -> None:
    refuses(await call(batch, ledger, "pause"), "give the name of a task, or --tag")
    refuses(await call(batch, ledger, "mute", "tick", "--all", "--for", "2h"), "give the name")
    refuses(await call(batch, ledger, "pause", "--tag", "nope"), "no task has the tag nope")
    planned = ("--from", "2099-12-05T22:00", "--for", "2h", "--note", "move of the database")
    done = await call(batch, ledger, "pause", "--all", *planned)
    assert done.out == (
        "planned: 4 tasks are paused by ann from 2099-12-05 22:00:00Z until 2099-12-06 00:00:00Z: "
        "move of the database\n"
    )
    done = await call(batch, ledger, "pause", "--pool", "default")
    assert done.out == "4 tasks (pool default) are paused by ann until it is ended\n"
    assert "muted by ann until" in (await call(batch, ledger, "mute", "--all", "--for", "2h")).out
    assert len(await rows(ledger, tables.tasks, paused_at=None)) == 0
    lines = (await call(batch, ledger, "maintenance", "list")).out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["now", "pause", "pool"],
        ["now", "mute", "all"],
        ["planned", "pause", "all"],
    ]
    assert "4 tasks (pool default) are paused" in (await call(batch, ledger, "night")).out
    assert (
        "ann paused the tasks of the pool default" in (await call(batch, ledger, "why", "tick")).out
    )
    ended = (await call(batch, ledger, "resume", "--pool", "default")).out
    assert ended == "the pause of pool default by ann has ended\n"
    nothing = (await call(batch, ledger, "resume", "--pool", "default")).out
    assert nothing == "no such pause lasts; `batch maintenance list` shows all\n"
    assert "the mute of all tasks" in (await call(batch, ledger, "unmute", "--all")).out
    id = lines[3].split()[-1]
    assert "the pause of all tasks" in (await call(batch, ledger, "maintenance", "end", id)).out
    assert (await call(batch, ledger, "maintenance", "list", "--json")).out == "[]\n"


@pytest.mark.parametrize("word", ["pause", "resume"])
async def test_an_unknown_task_is_refused_and_the_known_ones_are_listed(
    ledger: Database, batch: Batch, started: None, word: str
) -> None:
    refuses(await call(batch, ledger, word, "nope"), "'nope'", "long, often, sync, tick")


async def test_pausing_runs_no_code_of_an_author_and_fires_nothing_by_a_guess(
    ledger: Database, batch: Batch, started: None, tmp_path: Path
) -> None:
    """What is due and was not handled is missed: its policies are not known here."""
    (tmp_path / "tasks/loud.py").write_text("open('ran', 'w')\n")
    three_hours_ago = clock.now() - timedelta(hours=3)
    async with ledger.engine.begin() as connection:
        back = {"valid_from": three_hours_ago, "fired_until": three_hours_ago}
        is_tick = tables.schedules.c.task == "tick"
        await connection.execute(update(tables.schedules).where(is_tick).values(back))
        await connection.execute(update(tables.tasks).values(accounted_from=three_hours_ago))
    await call(batch, ledger, "pause", "tick")
    assert await rows(ledger, task="tick") == [] and not (tmp_path / "ran").exists()
    (range_,) = await rows(ledger, tables.missed, task="tick")
    assert (range_["count"], range_["reason"]) == (3, "not handled yet when it was paused by ann")
    (found,) = await _accounts(ledger, "tick")
    assert found.complete and found.missed == 3


async def test_a_pause_by_a_process_that_has_the_task_handles_due_slots_by_its_policies(
    ledger: Database,
) -> None:
    """As the service's API does. At half past, no slot is on time: one of this minute would get a
    run of its own.
    """
    with clock.moved(datetime(2026, 3, 10, 12, 30, tzinfo=UTC)):
        loaded = await know(ledger, make_task("tick", "0 * * * *"))
        two_hours_ago = clock.now() - timedelta(hours=2)
        async with ledger.engine.begin() as connection:
            await connection.execute(update(tables.schedules).values(fired_until=two_hours_ago))
        async with ledger.engine.begin() as connection:
            assert await pauses.pause(connection, "tick", "ann", loaded) is None
        assert len(await rows(ledger)) == 1
        await fire(ledger, loaded, clock.now())
    async with ledger.engine.connect() as connection:
        assert (await schedules.open_schedules(connection))["tick"].paused_by == "ann"


async def test_a_run_that_waits_is_cancelled_and_one_that_is_over_is_not(
    ledger: Database, batch: Batch, started: None
) -> None:
    run = new("tick")
    await insert(ledger, run)
    done = await call(batch, ledger, "cancel", run.id.replace("-", "")[:31])
    assert (done.code, done.out) == (0, f"run {run.id} cancelled: cancelled by ann\n")
    refuses(
        await call(batch, ledger, "cancel", run.id), run.id, "been cancelled (cancelled by ann)"
    )
    refuses(await call(batch, ledger, "cancel", "01a2"), "'01a2'", "6 digits")


async def test_a_cancel_that_nobody_hears_says_so(
    ledger: Database, batch: Batch, started: None
) -> None:
    run = new("tick", state="running", node=tables.new_id(), fence=1)
    await insert(ledger, run)
    done = await call(batch, ledger, "cancel", run.id, "--wait", "0")
    assert (done.code, done.out) == (1, f"run {run.id} is still running, and is asked to stop\n")


async def test_a_run_that_succeeded_begins_again_only_when_that_is_said(
    ledger: Database, batch: Batch, started: None
) -> None:
    run = new("tick", state="succeeded", attempt=1, fence=1)
    await insert(ledger, run)
    refuses(await call(batch, ledger, "retry", run.id), run.id, "has succeeded", "--again")
    done = await call(batch, ledger, "retry", run.id, "--again")
    assert (done.code, done.out) == (0, f"run {run.id} of tick is queued again\n")
    assert (
        done.err
        == "batch: no running service has the task tick: its runs wait for the next service "
        "that has it\n"
    )
    refuses(await call(batch, ledger, "retry", run.id, "--again"), run.id, "is queued")


async def test_a_run_from_before_a_pause_is_queued_again_and_the_person_is_told_of_the_pause(
    ledger: Database, batch: Batch, started: None
) -> None:
    run = new("tick", state="failed", attempt=1, fence=1)
    await insert(ledger, run)
    await call(batch, ledger, "pause", "tick")
    done = await call(batch, ledger, "retry", run.id)
    assert done.err == "batch: tick is paused by ann: its runs wait until `batch resume tick`\n"


async def test_backfill_lists_the_slots_then_makes_their_runs(
    ledger: Database, batch: Batch, started: None
) -> None:
    words = ("backfill", "tick", "--from", "2026-11-01T00:00", "--to", "2026-11-01T02:00")
    dry = await call(batch, ledger, *words, "--dry-run")
    assert dry.out.splitlines() == [
        *(f"2026-11-01 0{hour}:00:00Z  new    no run" for hour in range(3)),
        "3 slots of tick: 3 would get a new run, 0 would get a new attempt, 0 would not change",
    ]
    assert await rows(ledger) == []
    made = await call(batch, ledger, *words)
    assert (made.code, made.out) == (
        0,
        "3 slots of tick: 3 got a new run, 0 got a new attempt, 0 did not change\n",
    )
    assert {run["origin"] for run in await rows(ledger)} == {Origin.BACKFILL}
    assert "3 did not change" in (await call(batch, ledger, *words)).out
    async with ledger.engine.begin() as connection:
        await connection.execute(update(tables.runs).values(state="failed"))
    assert "3 got a new attempt" in (await call(batch, ledger, *words, "--again")).out
    assert {run["state"] for run in await rows(ledger)} == {"queued"}


async def test_a_backfill_that_is_larger_than_it_may_have_been_meant_needs_a_yes(
    ledger: Database, batch: Batch, started: None
) -> None:
    words = ("backfill", "often", "--from", "2026-11-01T00:00:01", "--to", "2026-11-01T02:46:41")
    refuses(await call(batch, ledger, *words), "more than 10,000", "--yes")
    assert (
        "10,001 would get a new run"
        in (await call(batch, ledger, *words, "--dry-run", "--yes")).out
    )
    refuses(await call(batch, ledger, "backfill", "nope", *words[2:]), "'nope'", "often")
    refuses(await call(batch, ledger, "backfill", "long", *words[2:]), "task long", "no schedule")


async def test_prune_says_what_would_go_and_deletes_it(
    ledger: Database, batch: Batch, started: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEEP_RUNS_PER_TASK", "1")
    old = datetime(2026, 1, 1, tzinfo=UTC)
    for _ in range(2):
        await insert(ledger, new("tick", state="failed", created_at=old, finished_at=old))
    dry = await call(batch, ledger, "prune", "--dry-run")
    assert (
        dry.out
        == "tick: 1 run would be deleted\n1 run that ended more than 90 days ago would be deleted\n"
    )
    assert len(await rows(ledger)) == 2
    assert (await call(batch, ledger, "prune")).out == "deleted 1 runs\n"
    assert (await call(batch, ledger, "prune")).out == "deleted nothing\n"
    assert len(await rows(ledger)) == 1


def test_wait_and_note_go_with_queue(batch: Batch) -> None:
    refuses(batch("run", "tick", "--wait"), "--wait needs --queue")
    refuses(batch("run", "tick", "--note", "why"), "--note needs --queue")


def test_a_task_that_no_service_has_is_not_queued(
    batch: Batch, files: None, tmp_path: Path
) -> None:
    assert batch("run", "tick").code == 0
    (tmp_path / "tasks/more.py").write_text(
        TASKS.split("class Sync")[0].replace('"long"', '"late"')
    )
    refuses(batch("run", "late", "--queue"), "late", "no service has loaded")
    refuses(batch("run", "tick", "--queue", "--param", "slot=1"), "--slot")
    refuses(batch("run", "nope", "--queue"), "'nope'", "tick")


@pytest.mark.rest
@pytest.mark.parametrize(
    ("option", "first", "second"),
    [
        (
            "--debounce",
            r"run (\S+) begins at \S+ \S+Z at the earliest",
            r"merged with run (\S+), which begins at \S+ \S+Z at the earliest",
        ),
        ("--once-in", r"run (\S+) queued", r"dropped: run (\S+) counts until \S+ \S+Z"),
    ],
)
def test_a_start_that_makes_no_run_names_the_run_that_stands_for_it(
    batch: Batch, files: None, option: str, first: str, second: str
) -> None:
    assert batch("run", "tick").code == 0
    started, joined = (batch("run", "tick", "--queue", option, "60").out for _ in range(2))
    found = re.fullmatch(f"{first}\n", started), re.fullmatch(f"{second}\n", joined)
    assert found[0] is not None and found[1] is not None, (started, joined)
    assert found[0][1] == found[1][1]


@pytest.mark.first_start
def test_without_a_ledger_there_is_nothing_to_manage(tmp_path: Path) -> None:
    done = command(tmp_path, "pause", "tick")
    assert (done.returncode, done.stdout) == (3, "")
    assert "there is no ledger yet" in done.stderr and not (tmp_path / "ledger.db").exists()
