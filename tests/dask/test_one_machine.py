"""`batch work --dask` on one machine, `batch work --ticket`, and the custom placer that
docs/pools.md shows.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from batch_system.batch.ledger import tables
from tests.batch.ledger_world import rows, until
from tests.dask.world import Place
from tests.docs_blocks import blocks, read
from tests.processes import BATCH, batch, free_port, process


@pytest.mark.nightly
async def test_a_scheduler_and_workers_of_this_machine_are_one_command_and_one_setting(
    place: Place,
) -> None:
    """A worker that is killed is started again, however long its start takes. Without our setting,
    Dask gives it 0.1 s.
    """
    address = f"dask://127.0.0.1:{free_port()}"
    (risk,) = (
        block for block in blocks(read("docs/dask.md"), "python") if block.file == "tasks/risk.py"
    )
    (place.folder / "tasks/risk.py").write_text(risk.code)
    at_once = {"DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT": "0.1s"}
    settings = {**place.settings, "BATCH_POOL_CPU": address, **at_once}
    command = (*BATCH, "work", "--dask", "--workers", "1", "--max-running", "3")
    with process(place.folder, command, settings) as worker:
        worker._wait_until(lambda: "pools" in worker.stdout, "has not begun")
        first, scheduler, dashboard, pools = worker.stdout.splitlines()
        assert first == "Dask on this machine: 1 workers, 3 places each"
        assert (scheduler.split(), pools.split()) == (["scheduler", address], ["pools", "cpu"])
        assert dashboard.split()[0] == "dashboard" and (
            "http://127.0.0.1:" in dashboard or "bokeh" in dashboard
        )
        place.serve(address)
        (node,) = await place.nodes(1)
        assert node["capacity"] == 3
        await place.queue("empty", 5, exclusive=None)
        await place.all_ended("empty", 5)
        (run,) = await place.queue("risk")
        assert (await place.ended(run))["result"] == sum(
            number * number for number in range(100_000)
        )
        os.kill(node["pid"], signal.SIGKILL)

        async def is_found_dead() -> bool:
            (row,) = await rows(place.ledger, tables.nodes, pid=node["pid"])
            return row["lost_at"] is not None

        await until(is_found_dead)
        await place.nodes(1, 120)
        await place.queue("empty", 5, exclusive=None)
        await place.all_ended("empty", 10)
        worker.stop(signal.SIGTERM, within=20)


def test_the_end_of_a_session_of_ssh_ends_the_cluster_as_sigterm_does(tmp_path: Path) -> None:
    settings = {"BATCH_POOL_CPU": f"dask://127.0.0.1:{free_port()}"}
    with process(tmp_path, (*BATCH, "work", "--dask", "--workers", "1"), settings) as worker:
        worker._wait_until(lambda: "pools" in worker.stdout, "has not begun")
        worker.stop(signal.SIGHUP, within=20)
        assert worker.process.returncode == 0, worker.stderr


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for words, said in (
        (("--workers", "2", "--pool", "cpu"), "--workers needs --dask"),
        (("--dask", "--ticket", "risk"), "can't be combined"),
        (("--dask", "--port", "0"), "can't be combined"),
        ((), "--pool is missing"),
    ):
        done = batch(tmp_path, "work", *words)
        assert done.returncode == 2 and said in done.stderr, done.stderr


@pytest.mark.nightly
async def test_the_placer_of_the_docs_executes_runs_in_processes_of_its_own(place: Place) -> None:
    (farm,) = (
        block for block in blocks(read("docs/pools.md"), "python") if block.file == "farm.py"
    )
    assert len(farm.code.strip().splitlines()) <= 40
    (place.folder / "farm.py").write_text(farm.code)
    command = place.folder / "bin/batch"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m batch_system "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    served = place.serve("placer:farm:Farm", PATH=path)
    await place.queue("empty", 40, exclusive=None)
    (urgent,) = await place.queue("urgent", priority=9)
    ended = await place.all_ended("empty", 40)
    where = {run["result"] for run in ended} | {(await place.ended(urgent))["result"]}
    assert served.process.pid not in where and len(where) >= 2
    nodes = [row for row in await place.nodes(0) if not row["fires"]]
    assert all(node["pools"] == ["cpu"] for node in nodes)
    assert {run["state"] for run in await rows(place.ledger)} == {"succeeded"} | {
        run["state"] for run in await rows(place.ledger, task="tick")
    }


async def test_a_placer_that_can_not_be_made_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "farm.py").write_text(
        "class Farm:\n    def __init__(self, pool): pass\n    async def places(self): ...\n"
    )
    for named, said in (
        ("farm:Farm", "has no place, close"),
        ("farm:Barn", "can't be made"),
        ("nowhere:X", "nowhere"),
    ):
        done = batch(
            tmp_path, "serve", "--port", "0", settings={"BATCH_POOL_CPU": f"placer:{named}"}
        )
        assert done.returncode != 0 and said in done.stderr, done.stderr
        assert "BATCH_POOL_CPU" in done.stderr and "Traceback" not in done.stderr


async def test_without_the_extra_the_start_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "missing").mkdir()
    (tmp_path / "missing/dask.py").write_text("raise ImportError")
    code = (
        "import sys; sys.path.insert(0, 'missing'); sys.argv = ['batch', 'serve', '--port', '0']\n"
    )
    (tmp_path / "start.py").write_text(f"{code}from batch_system.cli import main\nmain()\n")
    with process(
        tmp_path, (sys.executable, "start.py"), {"BATCH_POOL_CPU": "dask://127.0.0.1:1"}
    ) as served:
        assert served.process.wait(60) != 0
        assert "BATCH_POOL_CPU" in served.stderr and "batch-system[dask]" in served.stderr
        assert "Traceback" not in served.stderr
