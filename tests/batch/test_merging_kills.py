"""Three processes start runs that are merged, two services hand over, open and claim, and all of
them are killed at random: no start is lost, none counts twice, and none is overtaken by an older
one of the same process.

`pytest -s tests/batch/test_merging_kills.py` prints how late runs open.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pytest
from sqlalchemy import text

from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.database.companions import starts
from batch_system.database.engine import Database
from batch_system.testing.databases import wait_for
from tests.batch.ledger_world import rows
from tests.batch.starters import COMMAND, TASKS, WINDOW
from tests.migrations import APPLICATION_HISTORIES
from tests.processes import SERVE, Service, process

STARTERS = ("own1", "own2", "session")
SERVICES = ("one", "two")
LATEST, LATEST_WITH_KILLS = 5.0, 30.0
"""Seconds after which a run has opened on any machine. The figures are what is meant."""
TICK = 0.005
"""SQLite tells the time in milliseconds."""
END_SECONDS = 60.0

_SEEN = "CREATE TABLE seen (number {}, run TEXT, what TEXT, params TEXT, at DOUBLE PRECISION)"
_EVENTS = {
    "new": "INSERT",
    "merged": "UPDATE OF params",
    "opened": "UPDATE OF state",
}
_WHEN = {
    "new": "new.task = 'reindex'",
    "merged": "old.state = 'waiting' AND new.state = 'waiting'",
    "opened": "old.state = 'waiting' AND new.state <> 'waiting'",
}
WITNESS = {
    "sqlite": [
        _SEEN.format("INTEGER PRIMARY KEY AUTOINCREMENT"),
        *(
            f"CREATE TRIGGER seen_{what} AFTER {event} ON batch_runs WHEN {_WHEN[what]} BEGIN "
            f"INSERT INTO seen (run, what, params, at) VALUES (new.id, '{what}', new.params, "
            "(julianday('now') - 2440587.5) * 86400.0); END"
            for what, event in _EVENTS.items()
        ),
    ],
    "postgresql": [
        _SEEN.format("BIGSERIAL"),
        "CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO seen "
        "(run, what, params, at) VALUES (new.id, tg_argv[0], new.params, "
        "extract(epoch FROM clock_timestamp())); RETURN NULL; END $$",
        *(
            f"CREATE TRIGGER seen_{what} AFTER {event} ON batch_runs FOR EACH ROW "
            f"WHEN ({_WHEN[what]}) EXECUTE FUNCTION see('{what}')"
            for what, event in _EVENTS.items()
        ),
    ],
}
"""Triggers that write down what becomes of a run, in the transaction in which it does."""


@dataclass(frozen=True)
class Start:
    """What a starter has written down. `committed_at` (seconds since 1970): None if nobody knows
    whether it was committed.
    """

    key: str
    asked_at: float
    committed_at: float | None


@dataclass(frozen=True)
class Event:
    """What a trigger has written down."""

    run: str
    what: str
    key: str
    start: tuple[str, int]
    at: float


@pytest.fixture(params=["sqlite", "postgresql"])
def databases(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Database, ...]]:
    """The application's database and the ledger, with its triggers."""
    kind = request.getfixturevalue(f"{request.param}_databases")

    async def make() -> list[str]:
        urls = [
            await kind.make(tmp_path / "app.db", *APPLICATION_HISTORIES),
            await kind.make(tmp_path / "ledger.db", LEDGER_HISTORY),
        ]
        ledger = Database(urls[1], setting="LEDGER_URL", pooled=False)
        async with ledger.engine.begin() as connection:
            for statement in WITNESS[ledger.kind]:
                await connection.exec_driver_sql(statement)
        return urls

    urls = asyncio.run(make())
    yield tuple(
        Database(url, setting=name, pooled=False)
        for url, name in zip(urls, ("DATABASE_URL", "LEDGER_URL"), strict=True)
    )
    for url in urls:
        asyncio.run(kind.drop(url))


class Processes:
    """The starters and the services, in one folder."""

    def __init__(self, folder: Path, databases: tuple[Database, ...], stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self._settings = {
            each.setting: each.url.render_as_string(hide_password=False) for each in databases
        }
        self._alive: dict[str, Service] = {}
        (folder / "tasks").mkdir(exist_ok=True)
        (folder / "tasks/all.py").write_text(TASKS)

    def start(self, name: str) -> None:
        command = SERVE if name in SERVICES else (sys.executable, "-c", COMMAND)
        settings = {**self._settings, "STARTER": name}
        self._alive[name] = self._stack.enter_context(process(self.folder, command, settings))

    def kill(self, name: str) -> None:
        """Kill a process. It must have lived until now."""
        killed = self._alive[name].process
        assert killed.poll() is None, f"{name} has ended: {self._alive[name].stderr}"
        killed.kill()
        killed.wait()

    def wait_until_ready(self) -> None:
        for name in SERVICES:
            self._alive[name].wait_until_ready()

    def stop_starters(self) -> None:
        (self.folder / "stop").touch()
        for name in STARTERS:
            assert self._alive[name].process.wait(END_SECONDS) == 0, self._alive[name].stderr

    def starts(self) -> dict[tuple[str, int], Start]:
        """What the starters have written down."""
        found = dict[tuple[str, int], Start]()
        for name in STARTERS:
            for line in (self.folder / f"{name}.lines").read_text().splitlines():
                what, number, key, at = line.split()
                start = (name, int(number))
                asked_at = float(at) if what == "asked" else found[start].asked_at
                found[start] = Start(key, asked_at, float(at) if what == "committed" else None)
        return found


@pytest.mark.parametrize(
    ("quiet", "killing"),
    [
        pytest.param(3, 5, marks=pytest.mark.rest),
        pytest.param(15, 80, marks=pytest.mark.nightly),
    ],
)
def test_every_start_counts_once_and_in_its_order(
    databases: tuple[Database, ...], tmp_path: Path, quiet: int, killing: int
) -> None:
    """`quiet`, `killing`: so many seconds without kills, and then with them."""
    application, ledger = databases
    chance, kills = random.Random(41), 0
    with ExitStack() as stack:
        all_ = Processes(tmp_path, databases, stack)
        for name in SERVICES:
            all_.start(name)
        all_.wait_until_ready()
        for name in STARTERS:
            all_.start(name)
        time.sleep(quiet)
        killing_since = time.time()
        while time.time() < killing_since + killing:
            time.sleep(chance.random() * 0.8)
            name = chance.choice([*STARTERS, *SERVICES])
            all_.kill(name)
            all_.start(name)
            kills += 1
        all_.stop_starters()
        wait_for(until_over(application, ledger))
        started = all_.starts()
    made = wait_for(rows(ledger))
    events = wait_for(seen(ledger))
    check_starts(started, events)
    for key in ("a", "b"):
        check_order([event for event in events if event.key == key], started)
    check_windows([row for row in made if row["params"]["key"] == "w"], started)
    runs = {event.run for event in events}
    assert {row["id"] for row in made} == runs
    assert {row["state"] for row in made} == {"succeeded"}
    due = {row["id"]: row["due_at"].timestamp() for row in made}
    late = lateness(events, due)
    for name, bound, figures in (
        ("quiet", LATEST, [each for at, each in late if at < killing_since]),
        ("with kills", LATEST_WITH_KILLS, [each for at, each in late if at >= killing_since]),
    ):
        print(f"{ledger.kind}, {name}: opened late by {in_words(figures)}")
        assert max(figures) < bound
    took = [
        event.at - start.committed_at
        for event in events
        if event.what != "opened" and event.start[0] == "session" and event.at < killing_since
        for start in [started[event.start]]
        if start.committed_at is not None
    ]
    print(f"{ledger.kind}: handed over after {in_words(took)}")
    print(f"{len(started)} starts, {len(runs)} runs, {kills} kills")


async def until_over(application: Database, ledger: Database) -> None:
    """Wait until everything was handed over, and each run has ended."""
    unended = text("SELECT count(*) FROM batch_runs WHERE finished_at IS NULL")
    async with asyncio.timeout(END_SECONDS):
        while True:
            async with ledger.reader.connect() as connection:
                is_over = (await connection.execute(unended)).scalar_one() == 0
            if is_over and not await rows(application, starts):
                return
            await asyncio.sleep(0.2)


async def seen(ledger: Database) -> list[Event]:
    """In the order in which it happened, for the runs of one key."""
    query = text("SELECT run, what, params, at FROM seen ORDER BY number")
    async with ledger.reader.connect() as connection:
        found = (await connection.execute(query)).all()
    events = []
    for run, what, params, at in found:
        given = json.loads(params)
        start = (given["starter"], given["number"])
        events.append(Event(run, what, given["key"], start, float(at)))
    return events


def check_starts(started: dict[tuple[str, int], Start], events: list[Event]) -> None:
    """Each start that was committed has made a run or was merged, and none did so twice. In a
    window, most of them make none.
    """
    counted = [event.start for event in events if event.what != "opened"]
    assert len(counted) == len(set(counted))
    debounced = {
        start
        for start, each in started.items()
        if each.committed_at is not None and each.key != "w"
    }
    assert debounced <= set(counted)


def check_order(events: list[Event], started: dict[tuple[str, int], Start]) -> None:
    """One run of a key waits at a time, each opens, and the parameters of a starter never become
    older. What a starter with transactions of its own had committed when a run opened had counted
    by then.
    """
    waiting: str | None = None
    newest: dict[str, int] = defaultdict(int)
    committed = {
        start: each.committed_at
        for start, each in started.items()
        if each.committed_at is not None and start[0] != "session" and each.key == events[0].key
    }
    for event in events:
        if event.what == "new":
            assert waiting is None, event
            waiting = event.run
        assert waiting == event.run, event
        starter, number = event.start
        if event.what != "opened":
            assert number > newest[starter], event
            newest[starter] = number
            committed.pop(event.start, None)
        else:
            waiting = None
            late = {s for s, at in committed.items() if at < event.at - TICK}
            assert not late, (event, late)
    assert waiting is None


def check_windows(made: list[dict[str, Any]], started: dict[tuple[str, int], Start]) -> None:
    """In no window there are two runs, and each start lies in the window of one, or before one."""
    begun = sorted(row["created_at"].timestamp() for row in made)
    assert all(second - first > WINDOW - TICK for first, second in pairwise(begun))
    asked = [s.asked_at for s in started.values() if s.key == "w" and s.committed_at is not None]
    assert max(asked) - WINDOW - TICK < begun[-1]


def lateness(events: list[Event], due: dict[str, float]) -> list[tuple[float, float]]:
    """When runs opened, and how long after they could."""
    last: dict[str, float] = {}
    found = []
    for event in events:
        if event.what == "opened":
            found.append((event.at, event.at - max(due[event.run], last[event.run])))
        last[event.run] = event.at
    return found


def in_words(seconds: list[float]) -> str:
    return (
        f"p50 {median(seconds):.3f}, p90 {quantiles(seconds, n=10)[8]:.3f}, "
        f"at most {max(seconds):.3f} s ({len(seconds)})"
    )
