"""What is known when the services have come to rest: from the ledger, the witnesses and what was
observed.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tests.faults.observer import changes
from tests.faults.world import SERVICES, World, boottime

Row = dict[str, Any]


@dataclass
class Evidence:
    """`runs` and `attempts`: of the ledger. `rows`: of the witness in the application's database,
    in their order.

    `told`: the lines of the witness file. `finals`: the final states in which each run was seen, in
    their order. `reopened`: how often a person asked for a run to go on. `frozen`, `stopped`,
    `disturbed`: pid, since and until when in boot time. Stopped are processes that were frozen or
    ended; who was disturbed, by the network too, may have lost its lease. `has_one_clock`: what the
    ledger says about time is by one that did not step, and is ahead of boot time by `boot` seconds.
    `workers`: the pids of the processes that only execute the runs of a pool.
    """

    runs: list[Row] = field(default_factory=list)
    attempts: list[Row] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    told: list[Row] = field(default_factory=list)
    finals: dict[str, list[Any]] = field(default_factory=dict)
    reopened: Counter[str] = field(default_factory=Counter)
    frozen: list[tuple[int, float, float]] = field(default_factory=list)
    stopped: list[tuple[int, float, float]] = field(default_factory=list)
    disturbed: list[tuple[int, float, float]] = field(default_factory=list)
    has_one_clock: bool = True
    boot: float = 0.0
    workers: set[int] = field(default_factory=set)
    waits: list[Row] = field(default_factory=list)
    """The slots of other tasks that runs have waited for."""

    def of(self, event: str) -> Iterator[Row]:
        return (line for line in self.told if line["event"] == event)

    @cached_property
    def parents(self) -> dict[str, str]:
        """The run of each part, by the id of the part; also of parts that are gone since their run
        was split anew.
        """
        told = {line["run"]: line["of"] for line in self.of("start") if "of" in line}
        return told | {run["id"]: run["awaited_by"] for run in self.runs if run["origin"] == "part"}

    def asked(self, run: str) -> int:
        """How often a person has asked for a run to go on, or for the run of a part."""
        parent = self.parents.get(run)
        return self.reopened[run] + (self.reopened[parent] if parent is not None else 0)

    def starts(self) -> dict[str, dict[int, Row]]:
        """The lines of the event `start`, by run and fence."""
        starts: dict[str, dict[int, Row]] = defaultdict(dict)
        for line in self.of("start"):
            starts[line["run"]][line["fence"]] = line
        return starts


def gather(world: World) -> Evidence:
    columns = (
        "id, task, slot, origin, state, reason, attempt, attempts_before, fence, result, "
        "finished_at, parent, "
        "awaited_by, gate, part"
    )
    runs = [{**run, **_ids(run)} for run in world.query(f"SELECT {columns} FROM batch_runs")]
    attempts = world.query(
        "SELECT run, fence, number, outcome, node, started_at, ended_at FROM batch_attempts"
    )
    pids = {node["id"]: node["pid"] for node in world.query("SELECT id, pid FROM batch_nodes")}
    last = {
        run["id"]: (run["state"], run["fence"], str(run["finished_at"]))
        for run in runs
        if run["finished_at"] is not None
    }
    return Evidence(
        runs=[{**run, "result": _number(run["result"])} for run in runs],
        attempts=[
            {**attempt, "run": str(attempt["run"]), "pid": pids.get(attempt["node"])}
            for attempt in attempts
        ],
        rows=world.query(
            "SELECT number, run, task, fence, part FROM witness ORDER BY number", ledger=False
        ),
        told=[json.loads(line) for line in world.witness.read_text().splitlines()],
        finals=changes(world.finals, last),
        reopened=world.reopened,
        frozen=world.frozen,
        has_one_clock=world.server is not None,
        boot=time.time() - boottime(),
        workers={pid for pid, place in world.places.items() if place >= SERVICES},
        stopped=_by_pid(world, "pid {pid}"),
        disturbed=_by_pid(world, "pid {pid}", "place {place}"),
        waits=[
            {**row, "run": str(row["run"])}
            for row in world.query("SELECT run, task, slot FROM batch_waits")
        ],
    )


def _ids(run: Row) -> Row:
    return {name: run[name] and str(run[name]) for name in ("id", "parent", "awaited_by")}


def _by_pid(world: World, *names: str) -> list[tuple[int, float, float]]:
    return [
        (pid, since, until)
        for who, since, until in world.disturbed
        for pid, place in world.places.items()
        if who in [name.format(pid=pid, place=place) for name in names]
    ]


def _number(result: Any) -> int | None:
    return None if result in (None, "null") else int(result)


def summary(evidence: Evidence) -> str:
    """How much the checks had to look at."""
    states = Counter(run["state"] for run in evidence.runs)
    outcomes = Counter(attempt["outcome"] for attempt in evidence.attempts)
    seen = sum(bool(line["numbers"]) for line in evidence.of("seen"))
    waited = {row["run"] for row in evidence.waits} | {run["awaited_by"] for run in evidence.runs}
    of_these = Counter(
        f"{r['task']} {r['state']}"
        for r in evidence.runs
        if r["id"] in waited or r["task"] == "later"
    )
    return (
        f"{len(evidence.runs)} runs {dict(states)}, {len(evidence.attempts)} attempts "
        f"{dict(outcomes)}, "
        f"{len(evidence.rows)} commits; {seen} attempts began after commits of older ones; "
        f"of those that waited {dict(sorted(of_these.items()))}"
    )
