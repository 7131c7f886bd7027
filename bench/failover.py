"""How long after a process ends does another one resume its run?

    python bench/failover.py [--samples 5]

All are `batch serve` in processes of their own, with the default settings but DRAIN_SECONDS = 1.
The body of the run notes the time of the machine's monotonic clock as its first act; "resumed" is
from the signal to that line in the other process. For each sample a run is queued, the process that
has it is ended at a random moment, and the other one, which was started while the run was going on,
is the next one's victim.

- kill -9, same machine: to the whole process group.
- kill -9, another machine: the dead process has no locked file that the others see. So many
  processes with one run each are killed over five seconds, a heartbeat; one more is there to resume
  all of them. It has to wait for the lease.
- SIGTERM, checkpoint(): the run calls it every 10 ms, and stops there at once.
- SIGTERM, no checkpoint(): the run goes on until it is interrupted at the end of DRAIN_SECONDS.
  That second, which is granted to the run and not lost, is taken off.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

from machine import describe, print_table, version_of
from services import Worker, ending, insert, queued, start, wait_until, wait_until_ready

from batch_system.batch.nodes import process_lock
from batch_system.config import Settings
from batch_system.testing.postgres import PostgresServer, start_server

DRAIN = 1.0
LEASE = float(Settings.model_fields["LEASE_SECONDS"].default)
BEAT = float(Settings.model_fields["HEARTBEAT_SECONDS"].default)
MOST_SECONDS = 30.0

TASKS = """
import asyncio, os, time
from batch_system import BaseTask, current_run

def is_resumed():
    run = current_run().id
    with open("begun", "ab", buffering=0) as file:
        file.write(f"{run} {os.getpid()} {time.monotonic()}\\n".encode())
    with open("begun") as file:
        return sum(line.startswith(run) for line in file) > 1

class Endless(BaseTask):
    name, schedule, overlap = "endless", None, "allow"
    async def run(self):
        if not is_resumed():
            await asyncio.Event().wait()

class Checking(BaseTask):
    name, schedule, overlap = "checking", None, "allow"
    async def run(self):
        if not is_resumed():
            while True:
                current_run().checkpoint()
                await asyncio.sleep(0.01)
"""


class Fault(NamedTuple):
    task: str
    signal: int
    granted: float
    """Seconds that the run may go on after the signal."""


FAULTS = {
    "kill -9, same machine": Fault("endless", signal.SIGKILL, 0),
    "SIGTERM, checkpoint()": Fault("checking", signal.SIGTERM, 0),
    "SIGTERM, no checkpoint()": Fault("endless", signal.SIGTERM, DRAIN),
}


@dataclass
class Place:
    """A folder in which services work on one ledger, and where their runs note when they begin."""

    folder: Path
    url: str
    workers: list[Worker]
    """All that were started, here and elsewhere."""

    def __post_init__(self) -> None:
        (self.folder / "tasks").mkdir(parents=True)
        (self.folder / "tasks/bodies.py").write_text(TASKS)
        (self.folder / "begun").touch()

    def start(self, machine: Path | None = None, **settings: str) -> Worker:
        """Processes share their machine's temporary folder, and with it the files that say who
        lives there.
        """
        places = {"DATABASE_URL": f"sqlite:///{self.folder}/app.db", "LEDGER_URL": self.url}
        own = {
            **places,
            "DRAIN_SECONDS": str(DRAIN),
            "TMPDIR": str(machine or self.folder),
            **settings,
        }
        self.workers.append(start(self.folder, own))
        return self.workers[-1]

    def queue(self, task: str, number: int = 1) -> list[str]:
        new = queued([task] * number)
        asyncio.run(insert(self.url, new))
        return [one.id for one in new]

    def begun(self, run: str) -> list[tuple[int, float]]:
        """By which process and when, for each time that its body began."""
        lines = [line.split() for line in (self.folder / "begun").read_text().splitlines()]
        return [(int(pid), float(at)) for id_, pid, at in lines if id_ == run]


def resumed_after(place: Place, fault: Fault, old: Worker) -> tuple[float, Worker]:
    """Seconds from the signal to `old` until its run begins in another process, which is returned
    too.
    """
    (run,) = place.queue(fault.task)
    wait_until(lambda: place.begun(run), MOST_SECONDS)
    new = place.start()
    wait_until_ready([new])
    time.sleep(random.random())
    at = time.monotonic()
    old.signal(fault.signal)
    wait_until(lambda: len(place.begun(run)) > 1, MOST_SECONDS)
    (first, _), (second, resumed_at) = place.begun(run)
    if (first, second) != (old.pid, new.pid):
        raise SystemExit(
            f"process {second} resumed the run of {first}; expected: {new.pid} that of {old.pid}"
        )
    old.process.wait(MOST_SECONDS)
    return resumed_at - at - fault.granted, new


def on_one_machine(place: Place, samples: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in FAULTS}
    worker = place.start()
    wait_until_ready([worker])
    for name in [*FAULTS] * samples:
        seconds, worker = resumed_after(place, FAULTS[name], worker)
        found[name].append(seconds)
    worker.kill()
    return found


@dataclass
class Elsewhere:
    """Processes with one run each, every one of them on a machine of its own. One more is to resume
    all runs.
    """

    place: Place
    runs: list[str]
    victims: list[Worker]
    killed_at: dict[int, float] = field(default_factory=dict)

    def kill(self, worker: Worker) -> None:
        self.killed_at[worker.pid] = time.monotonic()
        worker.signal(signal.SIGKILL)

    def are_resumed(self) -> bool:
        return all(len(self.place.begun(run)) > 1 for run in self.runs)

    def seconds(self) -> list[float]:
        found = [self.place.begun(run) for run in self.runs]
        return [resumed_at - self.killed_at[pid] for (pid, _), (_, resumed_at) in found]


def settle(place: Place, number: int) -> Elsewhere:
    machines = [place.folder / str(n) for n in range(number)]
    for machine in machines:
        machine.mkdir()
    victims = [place.start(machine, MAX_RUNNING="1") for machine in machines]
    wait_until_ready(victims)
    runs = place.queue("endless", number)
    wait_until(lambda: all(place.begun(run) for run in runs), MOST_SECONDS)
    if place.url.startswith("sqlite"):  # there the locked files are beside the ledger
        for path in process_lock.folder_of(place.url).glob(f"{process_lock.PREFIX}*"):
            path.unlink()
    return Elsewhere(place, runs, victims)


def kill_all(groups: list[Elsewhere]) -> None:
    """At random moments within a heartbeat, once each process was seen."""
    wait_until_ready([group.place.start() for group in groups])
    began_at = time.monotonic() + 2
    victims = [
        (began_at + random.random() * BEAT, group, worker)
        for group in groups
        for worker in group.victims
    ]
    for at, group, worker in sorted(victims, key=lambda victim: victim[0]):
        time.sleep(max(0.0, at - time.monotonic()))
        group.kill(worker)


def row(kind: str, name: str, seconds: list[float], goal: float) -> list[str]:
    figures = [f"{figure:.2f}" for figure in (min(seconds), median(seconds), max(seconds))]
    return [
        f"{name}, {kind}",
        str(len(seconds)),
        *figures,
        f"<= {goal:g}: {'yes' if max(seconds) <= goal else 'no'}",
    ]


def measure(
    server: PostgresServer, folder: Path, workers: list[Worker], samples: int
) -> list[list[str]]:
    def place(kind: str, name: str) -> Place:
        own = folder / f"{kind}-{name}"
        sqlite = f"sqlite+aiosqlite:///{own}/ledger.db"
        return Place(
            own, sqlite if kind == "SQLite" else asyncio.run(server.create_database()), workers
        )

    kinds = ("SQLite", "PostgreSQL")
    elsewhere = {kind: settle(place(kind, "elsewhere"), samples) for kind in kinds}
    kill_all([*elsewhere.values()])
    # While the leases run out.
    same = {kind: on_one_machine(place(kind, "here"), samples) for kind in kinds}
    rows = [["", "samples", "min", "median", "max", "goal for all"]]
    rows += [row(kind, name, same[kind][name], 2) for name in FAULTS for kind in kinds]
    for kind, group in elsewhere.items():
        wait_until(group.are_resumed, LEASE + MOST_SECONDS)
        rows.append(
            row(kind, f"kill -9, another machine (lease {LEASE:g} s)", group.seconds(), LEASE + 2)
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=5, help="of each fault on each database")
    options = parser.parse_args()
    with (
        start_server(fast=False) as server,
        tempfile.TemporaryDirectory() as folder,
        ending() as workers,
    ):
        describe(postgresql=asyncio.run(version_of(server.url)))
        rows = measure(server, Path(folder), workers, options.samples)
    print_table(
        f"A run resumed by another process, seconds after the signal (DRAIN_SECONDS = {DRAIN:g})",
        rows,
    )


if __name__ == "__main__":
    main()
