"""`batch status` and `batch nodes`, and the hint of `tasks` and `runs`: whether a service lives,
and what is wrong.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from batch_system import clock
from batch_system.batch.ledger import tables
from batch_system.batch.ledger.states import RunState
from batch_system.cli.hints import NO_SERVICE
from batch_system.database.engine import Database
from batch_system.operations.asking.results import Node
from batch_system.operations.night.results import Status
from batch_system.testing.databases import wait_for
from tests.batch.ledger_world import know, make_task
from tests.batch.test_runs import insert, new
from tests.cli.test_console import in_terminal, without_styles
from tests.commands import Batch, in_this_process
from tests.outages import execute
from tests.processes import BATCH, service

HINT = f"batch: {NO_SERVICE}\n"


@pytest.fixture
def batch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    yield from in_this_process(capsys, monkeypatch)


async def test_a_killed_service_is_told_at_once_and_by_every_list(
    ledger_url: str, tmp_path: Path, batch: Batch
) -> None:
    def work() -> None:
        with service(tmp_path, settings={"LEDGER_URL": ledger_url}) as running:
            alive = batch("status", LEDGER_URL=ledger_url)
            assert (alive.code, alive.out.splitlines()[-1]) == (0, "Nothing needs you."), alive
            assert f"process {running.process.pid} on " in alive.out
            assert batch("runs").err == "batch: no runs match\n"
            assert batch("tasks").err == "batch: there is no task in TASKS_DIR\n"
            assert batch("nodes").out.splitlines()[1].split()[4] == "running"
            away = """'{"application": "it is \\u001b[2Jaway"}'"""
            wait_for(execute(ledger_url, f"UPDATE batch_nodes SET troubles = {away}"))
            said = (
                f"process {running.process.pid} on {socket.gethostname()}: application: it is "
                "\\x1b[2Jaway"
            )
            assert f"problem: {said}\n" in batch("status").out
            assert batch("nodes").err == f"batch: {said}\n"
            running.stop(signal.SIGKILL)
            dead = batch("status")
            assert dead.code == 1 and "services       none\n" in dead.out
            assert "problem: No service runs since " in dead.out
            for name in ("runs", "tasks"):
                done = batch(name)
                assert (done.code, done.err.endswith(HINT)) == (0, True)
                assert batch(name, "--json").err == ""
            assert batch("nodes").out.splitlines()[1].split()[4] == "silent"
            assert batch("status", "--json").json["troubles"][0]["kind"] == "down"

    await asyncio.to_thread(work)


@pytest.mark.first_start
def test_where_no_service_ever_ran_that_is_said_and_no_file_is_made(
    batch: Batch, tmp_path: Path
) -> None:
    done = batch("status")
    assert (done.code, done.out.splitlines()[-1]) == (
        1,
        "problem: there is no ledger yet: no service has ever run",
    )
    assert batch("nodes").err == "batch: no service has ever run\n"
    assert batch("nodes", "--json").json == []
    assert [path.name for path in tmp_path.iterdir()] == ["tasks"]


async def test_failures_are_told_until_they_are_made_good(
    ledger: Database, ledger_url: str, batch: Batch
) -> None:
    now = clock.now()
    await know(ledger, make_task("import"), make_task("report"))
    ended = {
        "state": RunState.FAILED,
        "exclusive": None,
        "reason": "OSError: no space",
        "finished_at": now,
    }
    lost = new("import", created_at=now - timedelta(hours=2), **ended)
    mended = new("report", created_at=now - timedelta(hours=2), **ended)
    await insert(ledger, lost, mended)
    async with ledger.engine.begin() as connection:
        await connection.execute(update(tables.runs).values(fingerprint="1:space"))
        good = update(tables.runs).where(tables.runs.c.id == mended.id)
        await connection.execute(good.values(made_good_at=now))
    done = await asyncio.to_thread(batch, "status", LEDGER_URL=ledger_url)
    assert done.code == 1 and "failed         1\n" in done.out
    assert "problem: import: 1 run failed: OSError: no space" in done.out
    assert f"{lost.id[-8:]}  import  " in done.out and "OSError: no space" in done.out
    assert mended.id[-8:] not in done.out
    found = (await asyncio.to_thread(batch, "status", "--json")).json
    assert list(found) == list(Status.model_fields)
    assert (found["failed"], [run["id"] for run in found["failed_runs"]]) == (1, [lost.id])


async def test_a_process_that_stopped_is_listed_as_stopped(
    ledger_url: str, tmp_path: Path, batch: Batch
) -> None:
    def work() -> None:
        with service(tmp_path, settings={"LEDGER_URL": ledger_url}) as running:
            running.stop()
        [line] = batch("nodes", LEDGER_URL=ledger_url).out.splitlines()[1:]
        assert line.split()[4] == "stopped"
        [node] = batch("nodes", "--json").json
        assert list(node) == list(Node.model_fields) and node["stopped_at"].endswith("Z")

    await asyncio.to_thread(work)


def test_a_narrow_terminal_has_whole_lines(tmp_path: Path) -> None:
    with service(tmp_path):
        lines = without_styles(in_terminal(tmp_path, [*BATCH, "nodes"], 40))
    assert len(lines) == 2 and all(len(line) <= 40 for line in lines)
    assert "running" in lines[1]
