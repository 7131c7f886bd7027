"""What several benches share: `batch serve` in real processes, and runs that wait for them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batch_system.batch.ledger import runs
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import Origin, Rank, RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.config import Settings
from batch_system.database.engine import Database

ROOT = Path(__file__).resolve().parents[1]
SERVE = (sys.executable, "-m", "batch_system", "serve", "--port", "0")
START_SECONDS = 300.0
"""On a machine with two cores and a load of twenty a start takes four minutes, with or without a
backlog.
"""


@dataclass(frozen=True)
class Worker:
    """A process in a process group of its own. What it prints is in `log`."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def check(self) -> None:
        """Ends the bench when the process has ended by itself."""
        if self.process.poll() is not None:
            raise SystemExit(f"a process ended by itself:\n{self.log.read_text()}")

    def is_ready(self) -> bool:
        """True once a service has said where it listens."""
        self.check()
        return "Batch System on" in self.log.read_text()

    def signal(self, number: int) -> None:
        """To the whole group."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)


def start(folder: Path, settings: Mapping[str, str], command: Iterable[str] = SERVE) -> Worker:
    """Start one in `folder`, with these variables and none of this process's settings. It is not
    ready yet.
    """
    kept = {name: value for name, value in os.environ.items() if name not in Settings.model_fields}
    environment = {**kept, "PYTHONPATH": f"{folder}:{ROOT}", "LOG_LEVEL": "WARNING", **settings}
    log = folder / f"{new_id()}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command),
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    return Worker(process, log)


@contextlib.contextmanager
def ending() -> Iterator[list[Worker]]:
    """A list of processes. Whatever of them still lives at the end is killed."""
    started: list[Worker] = []
    try:
        yield started
    finally:
        for worker in started:
            worker.kill()
            worker.process.wait()


def wait_until_ready(workers: Iterable[Worker]) -> None:
    for worker in workers:
        wait_until(worker.is_ready, START_SECONDS)


def wait_until(condition: Callable[[], object], seconds: float, pause: float = 0.01) -> None:
    """Until `condition()` is true, which is looked at every `pause` seconds. Ends the bench when it
    takes too long.
    """
    give_up_at = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > give_up_at:
            raise SystemExit(f"something that was waited for did not happen within {seconds:.0f} s")
        time.sleep(pause)


async def insert(url: str, new: Sequence[NewRun]) -> None:
    """Into the ledger at `url`, with one COMMIT."""
    database = Database(url, setting="LEDGER_URL", pooled=False)
    async with database.engine.begin() as connection:
        await runs.insert(connection, new)
        if database.kind == "postgresql":
            await connection.execute(text("ANALYZE batch_runs"))
    await database.dispose()


def cpu_seconds(pid: int, with_ended_children: bool = False) -> float:
    """Of one process, by Linux; 0 where it is gone or can't be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11 : 15 if with_ended_children else 13])) / os.sysconf("SC_CLK_TCK")


def queued(tasks: Iterable[str]) -> list[NewRun]:
    """A queued run for each name, due a second ago; of tasks whose runs don't exclude each
    other.
    """
    now = datetime.now(UTC) - timedelta(seconds=1)
    return [
        NewRun(
            id=new_id(),
            task=task,
            slot=now,
            origin=Origin.MANUAL,
            state=RunState.QUEUED,
            rank=Rank.MANUAL,
            catch_up=False,
            due_at=now,
            created_at=now,
        )
        for task in tasks
    ]
