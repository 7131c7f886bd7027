"""Services, clusters of Dask and workers as real processes, which share two databases."""

from __future__ import annotations

import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from batch_system.batch.ledger import run_logs, tables
from batch_system.database.engine import Database
from tests.batch.ledger_world import rows, until
from tests.batch.test_runs import insert, new
from tests.databases import items_done
from tests.processes import Service, process, service

SETTINGS = {
    "POLL_SECONDS": "0.1",
    "DRAIN_SECONDS": "5",
    "HEARTBEAT_SECONDS": "0.3",
    "LEASE_SECONDS": "10",
}

TASKS = """
import asyncio, os, time
from batch_system import BaseTask, Retry, current_run, get_logger
from sqlalchemy import text

logger = get_logger("authors")

class Long(BaseTask):
    name, schedule, pool = "long", None, "cpu"
    async def run(self) -> int:
        logger.info("begins", pid=os.getpid())
        async for chunk in self.chunks(range(40), size=1):
            async with chunk as (db, items):
                await db.execute(text("INSERT INTO done (item) VALUES (:item)"), {"item": items[0]})
            await asyncio.sleep(0.04)
        return os.getpid()

class Empty(BaseTask):
    name, schedule, pool, overlap = "empty", None, "cpu", "allow"
    def run(self) -> int:
        return os.getpid()

class Urgent(BaseTask):
    name, schedule, pool, priority = "urgent", None, "cpu", 9
    async def run(self) -> int:
        return os.getpid()

class Sleeping(BaseTask):
    name, schedule, pool = "sleeping", None, "cpu"
    async def run(self) -> None:
        logger.info("begins", pid=os.getpid())
        await asyncio.sleep(600)

class Large(BaseTask):
    name, schedule, pool, memory = "large", None, "cpu", "900 GiB"
    async def run(self) -> None:
        pass

class Tick(BaseTask):
    name, schedule, pool = "tick", "* * * * * *", "cpu"
    async def run(self) -> int:
        return os.getpid()
"""
OF_POOL = ("long", "empty", "urgent", "sleeping", "large", "tick")


class Cluster:
    """A Dask cluster that has begun. `process` is that of its scheduler."""

    def __init__(self, process: Service) -> None:
        self.process = process
        process._wait_until(lambda: "://" in process.stdout, "has no address")
        found = re.search(r"tcp://\S+", process.stdout)
        assert found is not None
        self.address = found[0].replace("tcp", "dask")

    @property
    def log(self) -> str:
        return self.process.stderr


class Place:
    """A folder with tasks, and two databases."""

    def __init__(self, folder: Path, ledger: Database, application: str, stack: ExitStack) -> None:
        self.folder, self.ledger, self._stack = folder, ledger, stack
        (folder / "tasks").mkdir(parents=True)
        (folder / "tasks/all.py").write_text(TASKS)
        url = ledger.url.render_as_string(hide_password=False)
        self.settings = {**SETTINGS, "LEDGER_URL": url, "DATABASE_URL": application}

    def cluster(
        self, workers: int = 2, places: int = 2, folder: Path | None = None, **settings: str
    ) -> Cluster:
        command = (sys.executable, "-m", "tests.dask.cluster", str(workers), str(places))
        return Cluster(
            self._stack.enter_context(
                process(folder or self.folder, command, self.settings | settings)
            )
        )

    def serve(self, cluster: Cluster | str, **settings: str) -> Service:
        address = cluster if isinstance(cluster, str) else cluster.address
        given = {**self.settings, "BATCH_POOL_CPU": address, **settings}
        return self._stack.enter_context(service(self.folder, settings=given))

    async def queue(self, task: str, number: int = 1, **more: Any) -> list[str]:
        queued = [new(task, **more) for _ in range(number)]
        await insert(self.ledger, *queued)
        return [run.id for run in queued]

    async def nodes(self, number: int, seconds: float = 60.0) -> list[dict[str, Any]]:
        """The nodes in the workers, once this number lives. Each is in a new process, whose start
        takes half a minute on a busy machine.
        """

        async def living() -> list[dict[str, Any]]:
            found = await rows(self.ledger, tables.nodes, fires=False, stopped_at=None)
            return found if len(found) >= number else []

        return list(await until(living, seconds))

    async def pid(self, run: str) -> int:
        """Wait until a run has logged the id of its process."""

        async def logged() -> list[int]:
            async with self.ledger.reader.connect() as connection:
                lines = await run_logs.tail(connection, run, 1_000)
            return [
                int(line.text.rpartition("pid=")[2]) for line in lines if "begins pid=" in line.text
            ]

        return int((await until(logged))[-1])

    async def in_state(self, run: str, *states: str) -> dict[str, Any]:
        async def reached() -> dict[str, Any] | None:
            (row,) = await rows(self.ledger, id=run)
            return row if row["state"] in states else None

        return dict(await until(reached))

    async def ended(self, run: str) -> dict[str, Any]:
        return await self.in_state(run, "succeeded", "failed", "cancelled")

    async def all_ended(
        self, task: str, number: int, seconds: float = 60.0
    ) -> list[dict[str, Any]]:
        async def are_over() -> list[dict[str, Any]]:
            ended = await rows(self.ledger, task=task, state="succeeded")
            return ended if len(ended) == number else []

        return list(await until(are_over, seconds))

    async def done(self) -> list[int]:
        """The items that runs of `long` have committed. The table refuses an item that is there
        already.
        """
        return await items_done(self.settings["DATABASE_URL"])
