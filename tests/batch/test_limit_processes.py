"""Limits with a total, kept by four processes that claim, of which some are killed and one is
frozen while it claims.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from batch_system.batch.ledger import database_time, nodes
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.ledger.tables import runs as runs_table
from batch_system.batch.nodes.orphans import rescue
from batch_system.database.engine import Database
from tests.batch.ledger_world import know
from tests.batch.limit_claimers import COMMAND, NUMBER, TOTAL, mail
from tests.batch.test_runs import insert, new
from tests.processes import ROOT, environment

NODES = 4
FROZEN_SECONDS = 2.5
"""Longer than PostgreSQL lets a transaction idle that has locked a limit."""


@dataclass
class Claimer:
    """A process, and the file of what it has said. `node`: the id of its node."""

    process: subprocess.Popen[bytes]
    node: str
    said: Path
    lost: dict[str, Any] | None = None
    """The keys of the runs that it had when it was killed."""

    @property
    def lines(self) -> list[dict[str, Any]]:
        text = self.said.read_text()
        found = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        return [*found, *([self.lost] if self.lost else [])]


@dataclass
class Claimers:
    """The processes that live, and all that there were."""

    url: str
    folder: Path
    living: list[Claimer] = field(default_factory=list)
    all: list[Claimer] = field(default_factory=list)

    def start(self) -> None:
        node = new_id()
        said = self.folder / f"{len(self.all)}.lines"
        with said.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, self.url, node],
                cwd=ROOT,
                env=environment(),
                stdout=file,
            )
        claimer = Claimer(process, node, said)
        self.living.append(claimer)
        self.all.append(claimer)

    async def kill(self, ledger: Database) -> None:
        """Kill one of them, rescue its runs, and start another."""
        claimer = self.living.pop(random.randrange(len(self.living)))
        claimer.process.kill()
        claimer.process.wait()
        async with ledger.engine.begin() as connection:
            now = await database_time.now_of(connection)
            seen = {"started_at": now, "seen_at": now, "draining": False, "tasks": ["mail"]}
            process = {"host": "elsewhere", "pid": claimer.process.pid, "version": "0"}
            await nodes.register(connection, {"id": claimer.node, **process, **seen})
            await rescue(connection, {claimer.node: 0}, now)
        claimer.lost = {"at": time.monotonic(), "lost": held_by(claimer.lines)}
        self.start()


def held_by(lines: Iterable[dict[str, Any]]) -> list[str]:
    held: Counter[str] = Counter()
    for line in lines:
        held.update(line.get("begun", ()))
        held.subtract(line.get("ended", ()))
    return list(held.elements())


@contextmanager
def four_claimers(url: str, folder: Path) -> Iterator[Claimers]:
    claimers = Claimers(url, folder)
    try:
        for _ in range(NODES):
            claimers.start()
        yield claimers
    finally:
        for claimer in claimers.all:
            claimer.process.kill()
            claimer.process.wait()


def longest_wait(lines: Iterable[dict[str, Any]], wanted: Counter[str]) -> float:
    """For how many turns at most a key with a waiting run and a free lane was not served: how often
    another key was served meanwhile. Each of the nodes serves each key once in a turn.
    """
    waits, begun = list[tuple[float, float]](), dict[str, list[float]]()
    left, going, since = Counter(wanted), Counter[str](), dict.fromkeys(wanted, 0.0)
    for line in sorted(lines, key=lambda line: line["at"]):
        at = line["at"]
        for tenant in line.get("begun", ()):
            begun.setdefault(tenant, []).append(at)
            if tenant in since:
                waits.append((since[tenant], at))
            left[tenant] -= 1
            going[tenant] += 1
            since[tenant] = at
        for tenant in (*line.get("ended", ()), *line.get("lost", ())):
            going[tenant] -= 1
            left[tenant] += tenant in line.get("lost", ())
            since.setdefault(tenant, at)
        for tenant in (*line.get("begun", ()), *line.get("ended", ()), *line.get("lost", ())):
            if left[tenant] < 1 or going[tenant] >= NUMBER:
                since.pop(tenant, None)
    waits.sort()
    ends = list(accumulate((end for _, end in waits), max))
    most = 0
    for times in begun.values():
        for number, at in enumerate(times):
            earlier = bisect_left(waits, (at, 0.0))
            if earlier:  # waits that began before; the last of them ends so late
                most = max(most, bisect_left(times, ends[earlier - 1]) - number)
    return most / NODES


@pytest.mark.rest
@pytest.mark.parametrize(
    ("keys", "runs", "kills"),
    [(1_000, 4_400, 4), pytest.param(10_000, 44_000, 16, marks=pytest.mark.nightly)],
)
async def test_four_processes_keep_a_limit_and_its_total_and_serve_every_key(
    ledger: Database, ledger_url: str, tmp_path: Path, keys: int, runs: int, kills: int
) -> None:
    """A hundredth of the keys have half of the runs."""
    await know(ledger, mail())
    wanted = await queue(ledger, keys, runs)
    most, began, killed, has_frozen = Counter[str](), time.monotonic(), 0, False
    with four_claimers(ledger_url, tmp_path) as claimers:
        while (succeeded := await number(ledger, "succeeded")) < runs:
            assert time.monotonic() - began < 900, f"{runs - succeeded} runs are left"
            now_running = await running(ledger)
            most |= now_running | Counter(total=now_running.total())
            if killed < kills and succeeded > runs * (killed + 1) / (kills + 2):
                await claimers.kill(ledger)
                killed += 1
            elif killed == kills // 2 and not has_frozen:
                has_frozen = True
                await freeze(claimers, ledger)
            await asyncio.sleep(0.05)
        took = time.monotonic() - began
    lines = [line for claimer in claimers.all for line in claimer.lines if "at" in line]
    wait, in_all = longest_wait(lines, wanted), most.pop("total")
    print(
        f"{ledger.kind}: {runs} runs of {keys} keys in {took:.0f} s, {killed} kills; at most "
        f"{max(most.values())} of a key and {in_all} in all; longest wait {wait:.2f} turns"
    )
    assert (killed, has_frozen) == (kills, True)
    assert max(most.values()) == NUMBER and NUMBER < in_all <= TOTAL
    assert {tenant for line in lines for tenant in line.get("begun", ())} == set(wanted)
    assert wait <= 2


async def queue(ledger: Database, keys: int, number: int) -> Counter[str]:
    """Queue so many runs. Returns how many each key has."""
    names = [f"t{n:05}" for n in range(keys)]
    wanted = Counter([*names, *random.choices(names, k=number // 2 - keys)])
    wanted.update(random.choices(names[::100], k=number // 2))
    tenants = list(wanted.elements())
    random.shuffle(tenants)
    for first in range(0, number, 1_000):
        some = tenants[first : first + 1_000]
        made = [new("mail", exclusive=f"mail[tenant={n}]", params={"tenant": n}) for n in some]
        await insert(ledger, *made)
    return wanted


async def number(ledger: Database, state: str) -> int:
    query = select(func.count()).select_from(runs_table).where(runs_table.c.state == state)
    async with ledger.reader.connect() as connection:
        return int((await connection.execute(query)).scalar_one())


async def running(ledger: Database) -> Counter[str]:
    query = select(runs_table.c.exclusive).where(runs_table.c.state == "running")
    async with ledger.reader.connect() as connection:
        return Counter((await connection.execute(query)).scalars())


async def freeze(claimers: Claimers, ledger: Database) -> None:
    """Freeze a process while it claims. On PostgreSQL the others go on meanwhile."""
    claimer = claimers.living[0]
    claimer.process.send_signal(signal.SIGUSR1)
    while not any("frozen" in line for line in claimer.lines):
        await asyncio.sleep(0.02)
    if ledger.kind == "sqlite":  # there is one writer at a time
        await asyncio.sleep(1)
    else:
        await asyncio.sleep(FROZEN_SECONDS)
        before = await number(ledger, "succeeded")
        await asyncio.sleep(1)
        assert await number(ledger, "succeeded") > before
    claimer.process.send_signal(signal.SIGCONT)
