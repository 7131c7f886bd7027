"""Wall clocks that are wrong, in real processes: stepped while a service runs, and different on
nodes of one ledger.

All services begin at the same time. About 20 s. On PostgreSQL the ledger's time is the server's; on
SQLite it is the node's own, so there the steps count. (Nodes on one SQLite file are on one machine,
and have one clock. They are set apart here all the same.)
"""

from __future__ import annotations

import re
import signal
import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from batch_system import clock
from batch_system.batch.ledger import tables
from batch_system.batch.ledger.incidents.tables import incidents
from batch_system.testing.databases import wait_for
from batch_system.testing.postgres import PostgresServer
from tests.faults.wrong_clock import SERVE, WrongClock
from tests.outages import Case, until
from tests.processes import Service, batch, process

HOUR, MINUTES = 3600.0, 180.0
SUSPEND = 90.0
SECOND = timedelta(seconds=1)
WAIT = 120.0
AHEAD = "the clock was ahead, up to"
KINDS = ("sqlite", "postgresql")
SETTINGS = {
    "POLL_SECONDS": "0.2",
    "HEARTBEAT_SECONDS": "0.5",
    "LEASE_SECONDS": "10",
    "DRAIN_SECONDS": "0.5",
}

TASKS = '''
import asyncio
import os
import time

from batch_system import BaseTask, Retry, current_run


def note(what):
    run = current_run()
    with open("witness", "ab", buffering=0) as file:
        file.write(f"{what} {run.task} {run.id} {run.fence}\\n".encode())
    with open("times", "ab", buffering=0) as file:
        file.write(f"{run.task} {run.id} {run.attempt} {time.monotonic()}\\n".encode())


class TickTask(BaseTask):
    name, schedule, overlap = "tick", "* * * * * *", "allow"

    async def run(self):
        note("ended")


class OneAtATimeTask(BaseTask):
    name, schedule = "one", "* * * * * *"

    async def run(self):
        note("ended")


class FlakyTask(BaseTask):
    name, schedule, overlap = "flaky", "* * * * * *", "allow"
    retry = Retry(attempts=2, wait=1.5, jitter=0)

    async def run(self):
        note("began")
        if current_run().attempt == 1:
            raise ConnectionError("not yet")


class PatientTask(BaseTask):
    """Ends when it is told to."""

    name, schedule = "patient", "* * * * * *"

    async def run(self):
        note("began")
        while not os.path.exists("go on"):
            await asyncio.sleep(0.02)
        note("ended")
'''


def make(kind: str, folder: Path, server: PostgresServer) -> Case:
    url = f"sqlite+aiosqlite:///{folder}/"
    application = f"{url}app.db" if kind == "sqlite" else wait_for(server.create_database())
    ledger = f"{url}ledger.db" if kind == "sqlite" else application
    return Case(folder / "service", application, ledger, dict(SETTINGS), TASKS)


class World:
    """On each kind of database a service whose clock is stepped, and three nodes whose clocks
    differ.
    """

    def __init__(self, folder: Path, server: PostgresServer, stack: ExitStack) -> None:
        self._stack = stack
        self.stepped = {kind: make(kind, folder / f"stepped-{kind}", server) for kind in KINDS}
        self.apart = {kind: make(kind, folder / f"apart-{kind}", server) for kind in KINDS}
        self.clocks = {kind: WrongClock(folder / f"{kind}.clock") for kind in KINDS}
        self.ahead: dict[str, Service] = {}
        self.others: list[Service] = []
        self.behind: tuple[datetime, datetime]
        self.ready: list[tuple[int, dict[str, str]]] = []
        """What `/readyz` says on SQLite while the clock was ahead, and after the tasks were
        resumed.
        """
        self.missed: list[dict[str, Any]] = []
        self.waiting: list[dict[str, Any]] = []
        self.status = self.resumed = ""

    def start(self, case: Case, wrong: WrongClock) -> Service:
        return self._stack.enter_context(
            process(case.folder, SERVE, {**case.settings, **wrong.settings})
        )

    def begin(self) -> None:
        for kind in KINDS:
            self.stepped[kind].service = self.start(self.stepped[kind], self.clocks[kind])
            self.ahead[kind] = self.start(self.apart[kind], self.clock_of(kind, MINUTES))
        for service in [*(case.service for case in self.stepped.values()), *self.ahead.values()]:
            service.wait_until_ready()
        for case in [*self.stepped.values(), *self.apart.values()]:
            until(lambda case=case: case.witness("began", "patient"), WAIT, "it works")
        for kind in KINDS:
            self.others += [
                self.start(self.apart[kind], self.clock_of(kind, by)) for by in (0.0, -MINUTES)
            ]
        for (
            service
        ) in self.others:  # on SQLite those behind say that the clock of the first one is ahead
            service.wait_until_said("Scheduler started")

    def clock_of(self, kind: str, seconds: float) -> WrongClock:
        return WrongClock(self.apart[kind].folder / f"{seconds:g}.clock", seconds)

    def ticks(self) -> dict[str, int]:
        return {kind: len(case.rows(task="tick")) for kind, case in self.stepped.items()}

    def step(self, seconds: float, kinds: tuple[str, ...] = KINDS) -> None:
        """Also wait until the services on these kinds of database have fired three more slots."""
        for wrong in self.clocks.values():
            wrong.set(seconds)
        before = self.ticks()
        until(
            lambda: all(self.ticks()[kind] > before[kind] + 2 for kind in kinds),
            WAIT,
            f"it fires at {seconds:+g} s",
        )

    def set_right(self) -> None:
        """After an hour ahead the clocks are right again. On SQLite nothing fires then, until the
        tasks are resumed.
        """
        sqlite = self.stepped["sqlite"]
        self.missed = sqlite.rows(tables.missed, task="tick")
        self.waiting = sqlite.rows(task="tick", state="waiting")
        self.step(0.0, ("postgresql",))
        until(lambda: "clock" in sqlite.readiness()[1], WAIT, "it says that the clock was ahead")
        self.ready.append(sqlite.readiness())
        until(lambda: AHEAD in self.batch("status"), WAIT, "batch status says so too")
        self.status = self.batch("status")
        self.resumed = self.batch("resume", "--ahead")
        self.step(0.0)
        until(lambda: sqlite.readiness()[0] == 200, WAIT, "it is ready")
        self.ready.append(sqlite.readiness())

    def batch(self, *words: str) -> str:
        case = self.stepped["sqlite"]
        return batch(case.folder, *words, settings=case.settings).stdout

    def lose_the_one_ahead(self) -> None:
        """The node that runs PatientTask stops: its run is to be resumed by one of those behind
        it.
        """
        for kind, service in self.ahead.items():
            case = self.apart[kind]
            service.stop(within=30)
            until(
                lambda case=case: (case.first, 2) in case.witness("began", "patient"),
                WAIT,
                f"{kind} resumes it",
            )

    def end(self) -> None:
        for case in [*self.stepped.values(), *self.apart.values()]:
            case.go_on()
        for kind, case in self.apart.items():
            until(
                lambda case=case: case.rows(id=case.first, state="succeeded"),
                WAIT,
                f"{kind} ends it",
            )
        for service in [*(case.service for case in self.stepped.values()), *self.others]:
            service.process.send_signal(signal.SIGTERM)
        for service in [*(case.service for case in self.stepped.values()), *self.others]:
            service.process.wait(30)


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, postgres_server: PostgresServer
) -> Iterator[World]:
    with ExitStack() as stack:
        world = World(tmp_path_factory.mktemp("clocks"), postgres_server, stack)
        world.begin()
        world.step(HOUR)
        before = datetime.now(UTC)
        world.set_right()
        world.behind = before, datetime.now(UTC)
        world.step(SUSPEND)
        world.lose_the_one_ahead()
        world.end()
        yield world


def of(case: Case, task: str) -> list[dict[str, Any]]:
    return sorted(case.rows(task=task), key=lambda run: run["slot"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["stepped", "apart"])
def test_no_slot_is_lost_or_doubled(world: World, name: str, kind: str) -> None:
    case: Case = getattr(world, name)[kind]
    for task in ("tick", "one", "flaky", "patient"):
        (cursor,) = [row["fired_until"] for row in case.rows(tables.schedules, task=task)]
        # A clock ahead has fired later ones.
        ran = [run["slot"] for run in of(case, task) if run["slot"] <= cursor]
        ranges = case.rows(tables.missed, task=task)
        inside = [
            slot
            for slot in ran
            for each in ranges
            if each["first_slot"] <= slot <= each["last_slot"]
        ]
        number = len(ran) + sum(each["count"] for each in ranges)
        assert len(ran) == len(set(ran)) and inside == [], task
        first, last = min([*ran, *(each["first_slot"] for each in ranges)]), ran[-1]
        assert number == (last - first) / SECOND + 1, task
    ahead = world.clocks[kind].seconds if (name, kind) == ("stepped", "sqlite") else 0
    with clock.moved(clock.now() + timedelta(seconds=ahead)):
        assert all(account.is_complete for account in case.accounts()), case.accounts()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["stepped", "apart"])
def test_no_body_ran_twice(world: World, name: str, kind: str) -> None:
    case: Case = getattr(world, name)[kind]
    ran = Counter(case.witness("ended", "tick"))
    assert set(ran.values()) == {1}
    assert {run["id"] for run in case.rows(task="tick", state="succeeded")} == {
        run for run, _ in ran
    }


def test_an_hour_forward_is_no_downtime_where_the_ledgers_clock_is_the_nodes(world: World) -> None:
    """Nobody was down, and what is caught up waits until the clock has been the same for ten
    minutes.
    """
    case = world.stepped["sqlite"]
    (hour,) = world.missed
    assert hour["reason"].startswith("the clock was set forward, from ")
    assert HOUR - 60 - 10 < hour["count"] < HOUR - 60 + 10
    (caught_up,) = world.waiting
    assert caught_up["slot"] == hour["last_slot"] + SECOND
    assert timedelta(minutes=10) < caught_up["due_at"] - caught_up["slot"] < timedelta(minutes=12)
    (incident,) = case.rows(incidents, kind="down")
    assert incident["text"].startswith("the clock was set forward from "), (
        "and not that no service fired"
    )


def test_while_the_clock_was_ahead_the_service_says_so_until_its_tasks_are_resumed(
    world: World,
) -> None:
    case = world.stepped["sqlite"]
    (status, reasons), (status_after, _) = world.ready
    assert (status, status_after) == (503, 200)
    assert AHEAD in reasons["clock"]
    assert f"problem: {AHEAD}" in world.status
    assert AHEAD in case.service.stderr
    assert len(re.findall("fires again; a clock was ahead, up to", world.resumed)) == 4
    (incident,) = case.rows(incidents, kind="clock")
    assert (incident["closed_why"], incident["count"]) == ("over", 4)


def test_on_postgresql_a_nodes_clock_decides_nothing(world: World) -> None:
    """No slot is missed, and none is so late that it meets the next one."""
    for case in (world.stepped["postgresql"], world.apart["postgresql"]):
        assert case.rows(tables.missed) == []
    begin, end = world.behind
    fired = [
        run for run in of(world.stepped["postgresql"], "tick") if begin < run["created_at"] < end
    ]
    assert statistics.median((run["created_at"] - run["slot"]).total_seconds() for run in fired) < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["stepped", "apart"])
def test_an_attempt_took_as_long_as_it_took(world: World, name: str, kind: str) -> None:
    case: Case = getattr(world, name)[kind]
    ended = case.rows(tables.attempts, outcome="succeeded")
    took = [(each["ended_at"] - each["started_at"]).total_seconds() for each in ended]
    assert min(took) >= 0
    assert sorted(took)[-2] < 30, "but for PatientTask"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_outlives_the_steps(world: World, kind: str) -> None:
    """No lease is lost: they go by the boot-time clock."""
    case = world.stepped[kind]
    assert case.rows(id=case.first)[0]["fence"] == 1
    assert "lease" not in case.service.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_a_retry_waits_as_long_as_it_should_on_nodes_whose_clocks_differ(
    world: World, kind: str
) -> None:
    """On SQLite only where one node runs both attempts: a retry is due by the clock of the node
    that looks.
    """
    case = world.apart[kind]
    began: dict[str, dict[int, float]] = {}
    for line in (case.folder / "times").read_text().splitlines():
        task, run, attempt, at = line.split()
        if task == "flaky":
            began.setdefault(run, {})[int(attempt)] = float(at)
    nodes = {(each["run"], each["number"]): each["node"] for each in case.rows(tables.attempts)}
    waits = sorted(
        times[2] - times[1]
        for run, times in began.items()
        if set(times) == {1, 2} and (kind == "postgresql" or nodes[run, 1] == nodes[run, 2])
    )
    assert len(waits) > 3
    assert waits[0] >= 1.5
    assert waits[len(waits) // 2] < 5
