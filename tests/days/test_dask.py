"""Runs on a Dask cluster of which a worker freezes, another one vanishes, or the scheduler is
killed. On PostgreSQL.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from batch_system.testing.databases import wait_for
from batch_system.testing.postgres import OwnServer
from tests.days.story import TWELVE, Story
from tests.processes import environment, free_port

pytestmark = pytest.mark.days

ON_DASK = '''

class OnDask(BaseTask):
    """In a worker of the cluster."""

    name, schedule, pool = "on-dask", "*/5 * * * * *", "cpu"

    async def run(self):
        note("began")
        await asyncio.sleep(1)
        note("ended")
'''


SCHEDULER = (
    "-m",
    "distributed.cli.dask_scheduler",
    "--host",
    "127.0.0.1",
    "--no-dashboard",
    "--port",
)
WORKER = ("-m", "distributed.cli.dask_worker", "--nthreads", "2", "--no-dashboard")


@contextmanager
def cluster(story: Story) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A scheduler and two workers, as processes of this machine, and the address."""
    log = story.folder / "cluster.log"
    command = [sys.executable, "-m", "tests.dask.cluster", "2", "2"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=story.folder,
            env=environment(story.settings),
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        found = story.until(
            lambda: re.search(r"tcp://\S+", log.read_text()), 60, "the cluster has an address"
        )
        yield process, found[0].replace("tcp", "dask")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def program(story: Story, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program of Dask, started as its users do."""
    with (story.folder / "dask.log").open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=story.folder,
            env=environment(story.settings),
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def worker_of_last_run(story: Story) -> int:
    return int([line for line in story.witness() if line[1] == "on-dask"][-1][4])


def test_a_worker_freezes_and_another_one_vanishes(server: OwnServer, tmp_path: Path) -> None:
    """Runs go on in the other worker; when both are gone they wait, and it is told that nobody
    serves the pool.
    """
    url = wait_for(server.create_database())
    with (
        Story(tmp_path / "story", {"DATABASE_URL": url}, TWELVE + ON_DASK) as story,
        cluster(story) as (_, address),
    ):
        story.settings["BATCH_POOL_CPU"] = address
        story.start("a", "b")
        story.until(lambda: "on-dask" in story.ended_since(0), 120, "runs end in workers")
        frozen, since = worker_of_last_run(story), story.now()
        os.kill(frozen, signal.SIGSTOP)
        story.wait(60)
        story.until(
            lambda: "on-dask" in story.ended_since(since + 50), 60, "runs end in the other worker"
        )
        os.kill(frozen, signal.SIGCONT)
        story.frozen.append((frozen, since, story.now()))
        os.kill(worker_of_last_run(story), signal.SIGKILL)
        story.wait(45)
        over = story.now()
        story.until(lambda: "on-dask" in story.ended_since(over), 60, "runs go on")
        story.check_end()
        story.check_told()  # others have done their work


def test_the_scheduler_is_killed_for_two_minutes(server: OwnServer, tmp_path: Path) -> None:
    """Its workers end with it. Runs wait, which is told, and go on in the workers of the next
    one.
    """
    url, port = wait_for(server.create_database()), str(free_port())
    with Story(tmp_path / "story", {"DATABASE_URL": url}, TWELVE + ON_DASK) as story:
        address = f"tcp://127.0.0.1:{port}"
        story.settings["BATCH_POOL_CPU"] = address.replace("tcp", "dask")
        with program(story, *SCHEDULER, port) as scheduler, program(story, *WORKER, address):
            story.start("a", "b")
            story.until(lambda: "on-dask" in story.ended_since(0), 120, "runs end in the worker")
            os.killpg(scheduler.pid, signal.SIGKILL)
            story.deaths[worker_of_last_run(story)] = story.now()
            story.wait(30)
        story.wait(90)
        assert "no node serves pool cpu" in story.status()
        with program(story, *SCHEDULER, port), program(story, *WORKER, address):
            over = story.now()
            story.until(lambda: "on-dask" in story.ended_since(over), 60, "runs go on")
            story.check_end()
            unserved = (
                "pool : no node serves pool cpu: 1 run of on-dask waits; start `batch work --pool "
                "cpu` on some machine, or the Dask cluster that BATCH_POOL_CPU names, or set "
                "BATCH_POOL_CPU=process"
            )
            story.check_told(f"opened {unserved}", f"closed {unserved}")
