"""Two services of several workers each on one ledger: each slot one run, whoever fires it.

REPLICA_WORKERS is how many workers each of them has: 2, and 4 in `make nightly`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest

from batch_system.batch.ledger import tables
from batch_system.database.engine import Database
from tests.batch.ledger_world import rows, until
from tests.processes import free_port

WORKERS = int(os.environ.get("REPLICA_WORKERS", "2"))

TASKS = """
import os
from batch_system import BaseTask, current_run

def witness(task):
    run = current_run()
    line = f"{task.name} {run.slot.isoformat()} {run.id} {os.getpid()}\\n"
    with open("witness", "ab", buffering=0) as file:
        file.write(line.encode())

class Async(BaseTask):
    name, schedule = "async", "* * * * * *"
    async def run(self): witness(self)

class Sync(BaseTask):
    name, schedule = "sync", "* * * * * *"
    def run(self): witness(self)

class Overlapping(BaseTask):
    name, schedule, overlap = "overlapping", "* * * * * *", "allow"
    async def run(self): witness(self)
"""


def start(folder: Path, url: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "batch_system.app:app",
        "--workers",
        str(WORKERS),
        "--port",
        str(free_port()),
    ]
    env = {**os.environ, "LEDGER_URL": url, "LOG_LEVEL": "WARNING", "DRAIN_SECONDS": "5"}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True
        )


def end(service: subprocess.Popen[bytes]) -> None:
    try:
        service.wait(30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(service.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "ledger_url", [pytest.param("sqlite", marks=pytest.mark.nightly), "postgresql"], indirect=True
)
async def test_two_processes_of_several_workers_give_each_slot_one_run(
    ledger: Database, tmp_path: Path
) -> None:
    (tmp_path / "tasks" / "witness.py").write_text(TASKS)
    url = ledger.url.render_as_string(hide_password=False)
    services = [start(tmp_path, url) for _ in range(2)]
    try:
        await until(lambda: nodes(ledger, 2 * WORKERS), 60)
        before = len(await rows(ledger))
        await until(lambda: enough(ledger, before + 4 * 3), 30)
    finally:
        for service in services:
            service.send_signal(signal.SIGTERM)
        await asyncio.gather(*(asyncio.to_thread(end, service) for service in services))
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log, log
    found = await rows(ledger)
    slots = Counter((run["task"], run["slot"]) for run in found)
    assert set(slots.values()) == {1}
    for name in ("async", "sync", "overlapping"):
        of_task = sorted(slot for task, slot in slots if task == name)
        assert len(of_task) == (of_task[-1] - of_task[0]) / timedelta(seconds=1) + 1, (
            "a slot has no row"
        )
    assert {run["state"] for run in found} <= {"succeeded", "skipped", "interrupted", "queued"}
    executed = [line.split() for line in (tmp_path / "witness").read_text().splitlines()]
    runs = Counter(run for _, _, run, _ in executed)
    assert set(runs.values()) == {1}
    assert set(runs) == {run["id"] for run in found if run["state"] == "succeeded"}
    assert await rows(ledger, tables.missed) == []


async def nodes(ledger: Database, number: int) -> bool:
    return len(await rows(ledger, tables.nodes)) >= number


async def enough(ledger: Database, number: int) -> bool:
    return len(await rows(ledger)) >= number
