"""Nodes that fall silent, in real processes: frozen, killed on another machine, cut off from the
ledger.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from batch_system import clock, config, current_run, logs
from batch_system.batch.ledger import tables
from batch_system.batch.nodes import process_lock
from batch_system.config import get_settings
from batch_system.database.engine import Database
from batch_system.server.service import BatchService
from batch_system.testing.postgres import OwnServer, find_binaries
from tests.batch.ledger_world import make_task, rows, until
from tests.processes import Service, service

LEASE = 3.0
SETTINGS = {"HEARTBEAT_SECONDS": "0.5", "LEASE_SECONDS": str(LEASE), "POLL_SECONDS": "0.1"}

TASK = """
import os, time
from batch_system import BaseTask, current_run

class Long(BaseTask):
    name, schedule = "long", "* * * * * *"

    def run(self) -> int:
        run = current_run().id
        with open("started", "a") as file:
            file.write(f"{run} {os.getpid()} {time.monotonic()}\\n")
        if len(open("started").readlines()) == 1:
            while not os.path.exists("go on"):  # in a thread, which nobody can stop
                time.sleep(0.01)
        return os.getpid()
"""


@pytest.fixture
def two_machines(ledger: Database, tmp_path: Path) -> Iterator[Any]:
    """Starts the service on a machine of its own: no other sees its locked file."""
    (tmp_path / "tasks/long.py").write_text(TASK)
    url = ledger.url.render_as_string(hide_password=False)
    with ExitStack() as stack:

        @contextmanager
        def start(machine: str) -> Iterator[Service]:
            folder = tmp_path / machine
            folder.mkdir()
            with service(
                tmp_path, settings={**SETTINGS, "LEDGER_URL": url, "TMPDIR": str(folder)}
            ) as started:
                yield started

        yield lambda machine: stack.enter_context(start(machine))


async def first_run(ledger: Database, folder: Path) -> dict[str, Any]:
    async def has_begun() -> list[dict[str, Any]]:
        return await rows(ledger, state="running") if (folder / "started").exists() else []

    return dict((await until(has_begun))[0])


def starts(folder: Path, run: str) -> list[tuple[int, float]]:
    lines = [line.split() for line in (folder / "started").read_text().splitlines()]
    return [(int(pid), float(at)) for id_, pid, at in lines if id_ == run]


@pytest.mark.rest
async def test_a_frozen_node_loses_its_run_and_comes_back_without_it(
    ledger: Database, tmp_path: Path, two_machines: Any
) -> None:
    a, b = two_machines("a"), None
    held = await first_run(ledger, tmp_path)
    b = two_machines("b")
    a.freeze(ledger.url)
    (done,) = await until(lambda: rows(ledger, id=held["id"], state="succeeded"), 60)
    assert (done["fence"], done["attempt"], done["result"]) == (2, 1, b.process.pid)
    (tmp_path / "go on").touch()  # its thread returns, and would have a success to tell
    os.kill(a.process.pid, signal.SIGCONT)

    async def has_come_back() -> bool:
        return "registers again" in a.stderr and f"another node holds run {held['id']}" in a.stderr

    await until(has_come_back)
    assert await rows(ledger, id=held["id"]) == [done]
    attempts = await rows(ledger, tables.attempts, run=held["id"])
    assert [(attempt["fence"], attempt["outcome"]) for attempt in attempts] == [
        (1, "lost"),
        (2, "succeeded"),
    ]
    assert len(starts(tmp_path, held["id"])) == 2
    b.stop()
    before = {run["id"] for run in await rows(ledger, node=held["node"])}

    async def runs_further_slots() -> bool:
        return any(
            run["id"] not in before
            for run in await rows(ledger, node=held["node"], state="succeeded")
        )

    await until(runs_further_slots)
    assert a.stderr.count("registers again") == 1
    assert "Traceback" not in a.stderr + b.stderr


@pytest.mark.rest
async def test_what_was_killed_on_another_machine_is_resumed_within_a_lease_and_two_seconds(
    ledger: Database, tmp_path: Path, two_machines: Any, record_property: Any
) -> None:
    a = two_machines("a")
    held = await first_run(ledger, tmp_path)
    two_machines("b")
    folder = process_lock.folder_of(ledger.url.render_as_string(hide_password=False))
    # Beside an SQLite file the nodes of one machine see each other.
    process_lock.file_of(folder, held["node"]).unlink(missing_ok=True)
    a.process.kill()
    killed_at = time.monotonic()
    (done,) = await until(lambda: rows(ledger, id=held["id"], state="succeeded"), LEASE + 5)
    assert done["node"] != held["node"]
    _, (_, second) = starts(tmp_path, held["id"])
    record_property("seconds_from_kill_to_resumption", second - killed_at)
    assert second - killed_at < LEASE + 2


async def test_runs_stop_before_their_lease_ends_when_the_ledger_is_away_and_nothing_is_doubled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spans: list[tuple[str, float, float]] = []

    async def run(self: object) -> None:
        began_at, run = clock.boottime(), current_run().id
        try:
            await asyncio.sleep(0 if any(run == known for known, _, _ in spans) else 60)
        finally:
            spans.append((run, began_at, clock.boottime()))

    make_task("patient", "* * * * * *", run)
    logs.set_up("INFO")
    with OwnServer(find_binaries(), fast=True) as server:
        for name, value in {**SETTINGS, "LEDGER_URL": await server.create_database()}.items():
            monkeypatch.setenv(name, value)
        config.forget_settings()
        service = BatchService(get_settings())
        await service.start()
        held = (await until(lambda: rows(service.ledger, state="running")))[0]
        await asyncio.to_thread(server.stop, "immediate")
        stopped_at = clock.boottime()
        await until(lambda: given_up(spans))
        assert spans[0][2] - stopped_at < LEASE
        assert "lease" in await service.readiness()
        await asyncio.sleep(LEASE / 2)
        await asyncio.to_thread(server.start)
        (done,) = await until(lambda: rows(service.ledger, id=held["id"], state="succeeded"), 20)
        attempts = await rows(service.ledger, tables.attempts, run=held["id"])
        assert [attempt["outcome"] for attempt in attempts] == ["interrupted", "succeeded"]
        assert done["fence"] == 2
        first, second = (span for span in spans if span[0] == held["id"])
        assert first[2] <= second[1]
        slots = [run["slot"] for run in await rows(service.ledger)]
        assert len(slots) == len(set(slots))
        await service.stop()


async def given_up(spans: list[tuple[str, float, float]]) -> bool:
    return bool(spans)
