"""Services in processes of their own: what they fire and print, how they stop, and what their
ledgers hold then.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import insert, select

from batch_system.batch.ledger import database_time, tables
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import FINAL, Rank
from batch_system.database.engine import Database
from batch_system.settings.urls import async_url
from batch_system.testing.postgres import PostgresServer
from service.application.models import User
from tests.batch.ledger_world import rows, until
from tests.processes import BATCH, SERVE, UVICORN, Service, batch, process, service
from tests.terminal import terminal

TICK = """
from batch_system import BaseTask, current_run, get_db
from service.application.models import User

class Tick(BaseTask):
    name, schedule = "tick", "* * * * * *"
    async def run(self):
        async with get_db() as db:
            db.add(User(email=current_run().id))
            await db.commit()
"""

LONG = """
import asyncio, pathlib
from batch_system import BaseTask

class Long(BaseTask):
    name, schedule = "long", "* * * * * *"
    async def run(self):
        if not pathlib.Path("quick").exists():
            await asyncio.Event().wait()
"""

COLLECTS = """
import gc, json, os, pathlib
from batch_system import BaseTask

class Collects(BaseTask):
    name, schedule = "collects", "* * * * * *"
    def run(self):
        found = [gc.get_threshold()[0], gc.get_freeze_count() > 10_000]
        pathlib.Path("told").write_text(json.dumps(found))
        os.replace("told", "collects")
"""

HANGS = """
import time
from batch_system import BaseTask

class Hangs(BaseTask):
    name, schedule = "hangs", "* * * * * *"
    def run(self): time.sleep(60)
"""

BLOCKS = """
import pathlib, time
from batch_system import BaseTask

class Blocks(BaseTask):
    name, schedule = "blocks", "* * * * * *"
    async def run(self):
        if pathlib.Path("block").exists():
            pathlib.Path("block").rename("blocked")
            time.sleep(3)
"""

BY_HAND = """
from batch_system import BaseTask

class ByHand(BaseTask):
    name, schedule = "by_hand", None
    async def run(self): pass
"""

QUICK_DRAIN = {"DRAIN_SECONDS": "0.2"}


def make_folder(folder: Path, **files: str) -> Path:
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    for name, code in files.items():
        (folder / "tasks" / f"{name}.py").write_text(code)
    return folder


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Database]:
    database = Database(async_url(url), setting="LEDGER_URL", pooled=False)
    yield database
    await database.dispose()


@asynccontextmanager
async def ledger_in(folder: Path) -> AsyncIterator[Database]:
    async with opened(f"sqlite+aiosqlite:///{folder}/ledger.db") as database:
        yield database


async def succeeded(ledger: Database, task: str, at_least: int) -> list[dict[str, Any]]:
    """Wait until this many runs of the task have succeeded."""

    async def found() -> list[dict[str, Any]]:
        runs = await rows(ledger, task=task, state="succeeded")
        return runs if len(runs) >= at_least else []

    return await until(found, 30)  # type: ignore[no-any-return]


async def is_running(ledger: Database, task: str) -> bool:
    return bool(await rows(ledger, task=task, state="running"))


def gaps(runs: Sequence[dict[str, Any]]) -> list[datetime]:
    """The seconds without a run between the first and the last slot."""
    slots = {run["slot"] for run in runs}
    seconds = int((max(slots) - min(slots)).total_seconds())
    return [at for n in range(seconds) if (at := min(slots) + timedelta(seconds=n)) not in slots]


def assert_all_are_over(runs: Sequence[dict[str, Any]]) -> None:
    """But for a slot that was fired while the drain began: it is left to the next service, and is
    the newest.
    """
    newest = max(run["slot"] for run in runs)
    assert {run["state"] for run in runs if run["slot"] < newest} <= {"succeeded", "skipped"}
    assert {run["state"] for run in runs if run["slot"] == newest} <= {
        "succeeded",
        "skipped",
        "interrupted",
        "queued",
    }


# Application and ledger on each kind of database.

MIXES = [(a, b) for a in ("sqlite", "postgresql") for b in ("sqlite", "postgresql")]


class Mixed:
    def __init__(self, folder: Path, settings: dict[str, str], running: Service) -> None:
        self.folder = folder
        self.settings = settings
        self.running = running

    def url(self, setting: str) -> str:
        named = self.settings.get(setting) or self.settings.get("DATABASE_URL")
        if named is not None and (setting in self.settings or named.startswith("postgresql")):
            return named
        name = "app" if setting == "DATABASE_URL" else "ledger"
        return f"sqlite+aiosqlite:///{self.folder}/{name}.db"


@pytest.fixture(scope="module")
async def mixes(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[tuple[str, str], Mixed]]:
    """A service for each mix of databases, all at the same time."""
    started = {}
    urls = []
    with ExitStack() as stack:
        for application, ledger in MIXES:
            folder = make_folder(tmp_path_factory.mktemp("mix"), tick=TICK)
            settings = {}
            if application == "postgresql":
                urls.append(await postgres_server.create_database())
                settings["DATABASE_URL"] = urls[-1]
            if application == "postgresql" and ledger == "sqlite":
                settings["LEDGER_URL"] = f"sqlite:///{folder}/ledger.db"
            if application == "sqlite" and ledger == "postgresql":
                urls.append(await postgres_server.create_database())
                settings["LEDGER_URL"] = urls[-1]
            running = stack.enter_context(service(folder, settings=settings))
            started[application, ledger] = Mixed(folder, settings, running)
        yield started
    for url in urls:
        await postgres_server.drop_database(url)


@pytest.mark.rest
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
async def test_each_mix_of_databases_fires_every_slot_once_and_keeps_what_the_task_wrote(
    mixes: dict[tuple[str, str], Mixed], mix: tuple[str, str]
) -> None:
    mixed = mixes[mix]
    async with (
        opened(mixed.url("LEDGER_URL")) as ledger,
        opened(mixed.url("DATABASE_URL")) as application,
    ):
        assert (application.kind, ledger.kind) == mix
        await succeeded(ledger, "tick", at_least=3)
        mixed.running.stop(signal.SIGTERM)
        runs = await rows(ledger, task="tick")
        slots = [run["slot"] for run in runs]
        assert len(slots) == len(set(slots)) and gaps(runs) == []
        assert_all_are_over(runs)
        async with application.session(readonly=True) as db:
            written = set(await db.scalars(select(User.email)))
        assert written == {run["id"] for run in runs if run["state"] == "succeeded"}
    listed = json.loads(batch(mixed.folder, "runs", "--json", settings=mixed.settings).stdout)
    assert {run["id"] for run in listed} == {run["id"] for run in runs}


# What it prints, and what it answers.


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with an every-second task, one by hand, and a file that doesn't import."""
    folder = make_folder(
        tmp_path_factory.mktemp("shared"), tick=TICK, by_hand=BY_HAND, broken="import nowhere"
    )
    with service(folder) as running:
        yield running


def test_serve_prints_its_address_its_databases_and_when_each_task_fires(shared: Service) -> None:
    assert re.fullmatch(
        r"Batch System on http://127\.0\.0\.1:\d+\n"
        r"  application  sqlite\+aiosqlite:///\./app\.db\n"
        r"  ledger       sqlite\+aiosqlite:///\./ledger\.db\n"
        r"  2 tasks, times in UTC:\n"
        r"    tick     next \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n"
        r"    by_hand  by hand\n"
        r"  can't be used: tasks/broken\.py: ModuleNotFoundError in line 1: No module named "
        r"'nowhere'\n",
        shared.stdout,
    )


def test_serve_lists_the_twenty_tasks_that_are_due_next_and_says_how_many_more_there_are(
    tmp_path: Path,
) -> None:
    minutes = "from batch_system import BaseTask\n" + "".join(
        f"class At{at}(BaseTask):\n    name, schedule = 'at_{at}', '{at} 0 1 1 *'\n    async def "
        "run(self): pass\n"
        for at in range(23)
    )
    with service(make_folder(tmp_path, minutes=minutes, by_hand=BY_HAND)) as running:
        lines = running.stdout.splitlines()
    assert (
        lines[3] == "  24 tasks, times in UTC:"
        and lines[-1] == "    ... and 4 more: `batch tasks` lists all"
    )
    assert [line.split()[0] for line in lines[4:-1]] == [f"at_{at}" for at in range(20)]


def test_uvicorns_own_lines_are_quiet_and_the_log_is_on_stderr(shared: Service) -> None:
    assert "uvicorn" not in shared.stderr
    assert "tasks/broken.py can't be used" in shared.stderr


def test_the_jobs_of_a_real_service_are_listed_over_http(shared: Service) -> None:
    before = datetime.now(UTC)
    jobs = {job["id"]: job for job in shared.get("/scheduler/jobs").json()}
    assert set(jobs) == {"tick", "by_hand"}
    assert jobs["by_hand"]["next_run_time"] is None
    assert (
        before
        < datetime.fromisoformat(jobs["tick"]["next_run_time"])
        < before + timedelta(seconds=5)
    )


def test_batch_serve_collects_garbage_less_often(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, collects=COLLECTS)
    with service(folder) as running:
        while not (folder / "collects").exists():
            time.sleep(0.02)
        running.stop()
    assert json.loads((folder / "collects").read_text()) == [10_000, True]


@pytest.mark.rest
async def test_a_second_service_on_the_same_files_starts_in_three_seconds(tmp_path: Path) -> None:
    make_folder(tmp_path, tick=TICK)
    async with ledger_in(tmp_path) as ledger:
        with service(tmp_path) as first:
            await succeeded(ledger, "tick", at_least=1)
            took = []
            for _ in range(3):  # the machine may be busy with something else just then
                began_at = time.monotonic()
                with service(tmp_path) as second:
                    took.append(time.monotonic() - began_at)
                    await succeeded(ledger, "tick", at_least=len(took) + 2)
                    second.stop()
                if took[-1] < 3:
                    break
            assert min(took) < 3
            await succeeded(ledger, "tick", at_least=len(took) + 3)
            first.stop()
            runs = await rows(ledger, task="tick")
        assert len({run["slot"] for run in runs}) == len(runs) and gaps(runs) == []
        assert_all_are_over(runs)
        assert "error" not in first.stderr + second.stderr
        assert all(node["stopped_at"] for node in await rows(ledger, tables.nodes))


# How it stops.


@pytest.mark.rest
@pytest.mark.parametrize(
    ("command", "number"),
    [
        (SERVE, signal.SIGTERM),
        (SERVE, signal.SIGHUP),
        (UVICORN, signal.SIGINT),
        (UVICORN, signal.SIGHUP),
    ],
    ids=["serve-SIGTERM", "serve-SIGHUP", "uvicorn-SIGINT", "uvicorn-SIGHUP"],
)
async def test_a_signal_ends_the_service_in_time_and_an_interrupted_run_resumes_in_the_same_attempt(
    tmp_path: Path, command: Sequence[str], number: int
) -> None:
    make_folder(tmp_path, tick=TICK, long=LONG)
    async with ledger_in(tmp_path) as ledger:
        with service(tmp_path, command, QUICK_DRAIN) as running:
            await succeeded(ledger, "tick", at_least=2)
            await until(lambda: is_running(ledger, "long"))
            running.stop(number, within=10)  # on a machine that other tests keep busy
            assert "Traceback" not in running.stderr
        assert_all_are_over(await rows(ledger, task="tick"))
        runs = await rows(ledger, task="long")
        assert {run["state"] for run in runs} <= {*FINAL, "interrupted"}
        (cut,) = [run for run in runs if run["state"] == "interrupted"]
        assert (cut["attempt"], cut["reason"]) == (1, "the service stopped")

        (tmp_path / "quick").touch()
        with service(tmp_path, command, QUICK_DRAIN) as running:
            await until(lambda: rows(ledger, id=cut["id"], state="succeeded"), 10)
            running.stop()
        (resumed,) = await rows(ledger, id=cut["id"])
        tries = await rows(ledger, tables.attempts, run=cut["id"])
        assert resumed["attempt"] == 1
        assert [(row["number"], row["outcome"]) for row in tries] == [
            (1, "interrupted"),
            (1, "succeeded"),
        ]


@pytest.mark.rest
@pytest.mark.parametrize(
    ("command", "number"),
    [(SERVE, signal.SIGTERM), (SERVE, signal.SIGINT), (UVICORN, signal.SIGTERM)],
    ids=["serve-SIGTERM", "serve-SIGINT", "uvicorn-SIGTERM"],
)
async def test_a_sync_task_that_hangs_in_sleep_does_not_delay_the_end_of_the_process(
    tmp_path: Path, command: Sequence[str], number: int
) -> None:
    make_folder(tmp_path, hangs=HANGS)
    async with ledger_in(tmp_path) as ledger:
        with service(tmp_path, command, QUICK_DRAIN) as running:
            await until(lambda: is_running(ledger, "hangs"))
            assert running.stop(number, within=8) < 5
        assert {run["state"] for run in await rows(ledger)} <= {"interrupted", "skipped"}


@pytest.mark.rest
def test_enter_in_the_terminal_prints_another_link_until_there_is_a_token(tmp_path: Path) -> None:
    link = r"(http://[\d.:]+)/signin#(bl_\w{12}_[\w-]{43})"

    def links(text: str) -> list[tuple[str, str]]:
        return re.findall(link, text)

    with terminal(tmp_path, SERVE, 200) as shown:
        for number in (1, 2):
            shown.until(
                lambda _, number=number: (
                    len(links(shown.raw)) == number and "another link" in shown.raw
                )
            )
            os.write(shown._ours, b"\n")
        (url, first), (_, second) = links(shown.raw)[:2]
        for secret in (first, second):
            begun = httpx.post(f"{url}/api/v1/session", json={"secret": secret}, trust_env=False)
            assert begun.status_code == 201
        assert batch(tmp_path, "token", "create", "ann", "--role", "admin").returncode == 0
        os.write(shown._ours, b"\n")
        shown.until(lambda _: "there is a token now" in shown.raw)


FORKS = """
import os, time
from batch_system import BaseTask

class Forks(BaseTask):
    name, schedule = "forks", None

    def run(self) -> None:
        if os.fork() == 0:
            with open("child", "w") as file:
                file.write(str(os.getpid()))
            os.rename("child", "child.pid")
            time.sleep(600)
"""


@pytest.mark.rest
async def test_a_forked_child_that_outlives_its_service_does_not_keep_the_port(
    tmp_path: Path,
) -> None:
    make_folder(tmp_path, forks=FORKS)
    child = tmp_path / "child.pid"

    async def has_forked() -> bool:
        return child.exists()

    try:
        with service(tmp_path) as running:
            assert batch(tmp_path, "run", "forks", "--queue").returncode == 0
            await until(has_forked)
            running.process.kill()
            running.process.wait()
            with pytest.raises(httpx.ConnectError):
                running.get("/healthz")
        with service(tmp_path, (*SERVE[:-1], running.url.rpartition(":")[2])) as again:
            assert again.url == running.url
            again.stop()
        os.kill(int(child.read_text()), 0)  # it lives
    finally:
        os.kill(int(child.read_text()), signal.SIGKILL)


async def test_a_run_that_ends_within_drain_seconds_is_not_interrupted(tmp_path: Path) -> None:
    drains = (
        "pathlib.Path('begun').touch()\n            while 'Stopping: ' not in "
        "pathlib.Path('0.stderr').read_text(): await asyncio.sleep(0.02)"
    )
    make_folder(tmp_path, long=LONG.replace("await asyncio.Event().wait()", drains))
    async with ledger_in(tmp_path) as ledger:
        with service(tmp_path, settings={"DRAIN_SECONDS": "10"}) as running:
            # The ledger says "running" a moment before the body begins, and a run whose body has
            # not begun is interrupted at once.
            await until(lambda: _exists(tmp_path / "begun"))
            running.stop(within=20)
            assert "Stopping: 1 running, with 10 s to end" in running.stderr
        assert {run["state"] for run in await rows(ledger)} <= {"succeeded", "skipped"}


# What a bad task can't do.


@pytest.mark.rest
async def test_no_slot_is_lost_while_a_bad_task_blocks_the_event_loop(tmp_path: Path) -> None:
    make_folder(tmp_path, tick=TICK, blocks=BLOCKS)
    async with ledger_in(tmp_path) as ledger:
        with service(tmp_path) as running:
            await succeeded(ledger, "tick", at_least=1)
            (tmp_path / "block").touch()
            await until(lambda: _exists(tmp_path / "blocked"))
            blocked_at = datetime.now(UTC)
            after = timedelta(seconds=4)
            await until(lambda: _has_slot(ledger, blocked_at + after), 15)
            running.stop()
        runs = await rows(ledger, task="tick")
        late = [run for run in runs if run["created_at"] - run["slot"] > timedelta(seconds=1)]
        assert len(late) >= 2, "the loop was not blocked, so this test shows nothing"
        assert gaps(runs) == []
        assert_all_are_over(runs)


async def _exists(path: Path) -> bool:
    return path.exists()


async def _has_slot(ledger: Database, since: datetime) -> bool:
    return any(run["slot"] >= since for run in await rows(ledger, task="tick"))


# `batch run` beside a service.

ONE_AT_A_TIME = """
import asyncio, pathlib
from batch_system import BaseTask, current_run, get_logger

class OneAtATime(BaseTask):
    name, schedule = "one_at_a_time", None
    async def run(self, until: str = ""):
        get_logger(__name__).info(f"began with {until!r}")
        while until and not pathlib.Path(until).exists():
            await asyncio.sleep(0.02)
"""


async def test_a_run_by_hand_beside_a_service_claims_no_other_run(tmp_path: Path) -> None:
    make_folder(tmp_path, one=ONE_AT_A_TIME, by_hand=BY_HAND)
    async with ledger_in(tmp_path) as ledger:
        # The service will not see it either.
        with service(tmp_path, settings={"POLL_SECONDS": "60"}):
            await until(lambda: rows(ledger, tables.nodes))
            queued = tables.new_id()
            async with ledger.engine.begin() as connection:
                now = await database_time.now_of(connection)
                name = "one_at_a_time"
                other = NewRun(
                    queued,
                    name,
                    None,
                    "manual",
                    "queued",
                    Rank.MANUAL,
                    False,
                    now,
                    now,
                    exclusive=name,
                )
                # This tells the service nothing.
                await connection.execute(insert(tables.runs).values(**asdict(other)))
            done = batch(tmp_path, "run", "by_hand", settings={"POLL_SECONDS": "0.05"})
            assert done.returncode == 0
            found = {run["task"]: run for run in await rows(ledger)}
        assert (found["by_hand"]["origin"], found["by_hand"]["state"]) == ("manual", "succeeded")
        assert (found["one_at_a_time"]["id"], found["one_at_a_time"]["state"]) == (queued, "queued")


async def test_a_run_by_hand_waits_for_the_one_that_is_active(tmp_path: Path) -> None:
    make_folder(tmp_path, one=ONE_AT_A_TIME)
    word = [*BATCH, "run", "one_at_a_time"]
    async with ledger_in(tmp_path) as ledger:
        with service(tmp_path), process(tmp_path, [*word, "--param", "until=go"]) as first:
            await until(lambda: is_running(ledger, "one_at_a_time"), 20)
            with process(tmp_path, word) as second:
                await until(
                    lambda: _says(
                        second, "another run of one_at_a_time is active; waiting for its end"
                    ),
                    20,
                )
                assert len(await rows(ledger)) == 1
                (tmp_path / "go").touch()
                assert (first.process.wait(20), second.process.wait(20)) == (0, 0)
        one, two = sorted(await rows(ledger), key=lambda run: run["created_at"])
        assert one["finished_at"] <= two["started_at"]


@pytest.mark.rest
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_a_run_by_hand_that_gets_a_signal_is_interrupted_and_resumed_by_a_service(
    tmp_path: Path, number: int
) -> None:
    make_folder(tmp_path, one=ONE_AT_A_TIME)
    with process(
        tmp_path, [*BATCH, "run", "one_at_a_time", "--param", "until=go"], QUICK_DRAIN
    ) as by_hand:
        await until(lambda: _says(by_hand, "began with 'go'"), 20)
        by_hand.stop(number, within=5)
        assert by_hand.process.returncode == 128 + number
        assert (
            "stopping: if the run does not end within 0.2 s, it is interrupted, and a service "
            "resumes it" in by_hand.stderr
        )
        assert "Traceback" not in by_hand.stderr
    async with ledger_in(tmp_path) as ledger:
        assert [run["state"] for run in await rows(ledger)] == ["interrupted"]
        (tmp_path / "go").touch()
        with service(tmp_path):
            await until(lambda: rows(ledger, state="succeeded", attempt=1))


async def _says(by_hand: Service, text: str) -> bool:
    return text in by_hand.stderr
