"""The forecast on the recorded fortnight of the demonstration: at each five minutes of it, from
what the ledger had then.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import select

from batch_system.batch.incidents.durations import UsualDurations
from batch_system.batch.incidents.forecast import (
    Facts,
    KnownRun,
    KnownTask,
    Promise,
    Slot,
    forecasts,
)
from batch_system.batch.ledger import schedules, tables
from batch_system.batch.ledger.states import RunState
from batch_system.config import get_settings
from batch_system.database.engine import Database
from batch_system.demo import files, making
from batch_system.demo.times import DOWNS, FORTNIGHT, NOW
from batch_system.operations.asking.databases import open_databases

LOOK = timedelta(minutes=5)
IN_TIME = timedelta(minutes=15)
QUARTER = 900.0


@dataclass(frozen=True)
class Recorded:
    """A run, with its attempts: when each began and ended, and how."""

    id: str
    made: datetime
    attempts: Sequence[tuple[datetime, datetime | None, str]]
    state: RunState
    ended: datetime | None

    def at(self, now: datetime) -> KnownRun | None:
        """The run as it was then."""
        if self.made > now:
            return None
        if self.ended is not None and self.ended <= now:
            began = self.attempts[-1][0] if self.attempts else None
            return KnownRun(self.id, self.state, self.made, began, self.ended)
        begun = [each for each in self.attempts if each[0] <= now]
        if begun and (begun[-1][1] is None or begun[-1][1] > now):
            return KnownRun(self.id, RunState.RUNNING, self.made, begun[-1][0])
        if begun:
            following = [each[0] for each in self.attempts if each[0] > now]
            due = following[0] if following else now
            return KnownRun(self.id, RunState.RETRYING, due)
        return KnownRun(self.id, RunState.QUEUED, self.made)


async def recorded(ledger: Database) -> tuple[dict[str, KnownTask], dict[Slot, Recorded]]:
    """What is usual for each task, and the runs of its slots of the fortnight."""
    async with ledger.engine.connect() as connection:
        known: dict[str, KnownTask] = {}
        for name, row in (await schedules.open_schedules(connection)).items():
            usual = await UsualDurations(connection, NOW).of_task(name)
            if row.is_usable and usual.runs >= 10:
                known[name] = KnownTask(usual.p50, usual.p95, usual.runs)
        runs = tables.runs
        query = select(runs).where(runs.c.slot > FORTNIGHT, runs.c.origin == "schedule")
        rows = (await connection.execute(query)).all()
        attempts: dict[str, list[tuple[datetime, datetime | None, str]]] = {}
        of_runs = select(tables.attempts).order_by(tables.attempts.c.fence)
        for each in await connection.execute(of_runs):
            attempts.setdefault(each.run, []).append((each.started_at, each.ended_at, each.outcome))
    found = {}
    for row in rows:
        its = attempts.get(row.id, [])
        if row.state == RunState.RUNNING and row.attempt_started_at is not None:
            its = [*its, (row.attempt_started_at, None, "")]
        state = RunState(row.state)
        found[row.task, row.slot] = Recorded(row.id, row.created_at, its, state, row.finished_at)
    return known, found


def promised(known: Mapping[str, KnownTask], runs: Mapping[Slot, Recorded]) -> list[Promise]:
    """Each slot of a task that takes five minutes or more is promised as people promise: half as
    late again as usual, and half an hour, to a whole quarter of an hour.
    """
    made = []
    for task, slot in runs:
        usual = known[task].p50 if task in known else None
        if usual is not None and usual >= 300 and slot is not None:
            seconds = -(-(1.5 * usual + 1_800) // QUARTER) * QUARTER
            made.append(Promise(task, slot, slot + timedelta(seconds=seconds)))
    return [each for each in made if each.deadline <= NOW]


@pytest.mark.nightly
async def test_the_forecast_of_the_recorded_fortnight_comes_true(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    files.write(folder)
    await making.make_night(folder)
    await making.fill(folder)
    with files.in_folder(folder):
        application, ledger = await open_databases(get_settings())
        try:
            known, runs = await recorded(ledger)
        finally:
            await ledger.dispose()
            await application.dispose()
    promises = promised(known, runs)
    by_task: dict[str, list[tuple[datetime, KnownRun]]] = {}
    last: dict[Promise, str] = {}
    called: dict[Promise, set[str]] = {}
    slots = {name: sorted(s for t, s in runs if t == name and s is not None) for name in known}
    now = FORTNIGHT
    while now < NOW:
        now += LOOK
        if any(down.has(now) for down in DOWNS):
            continue  # nobody can ask
        meant = [
            each
            for each in promises
            if now < each.deadline <= now + timedelta(hours=12) and not _is_over(each, runs, now)
        ]
        present = {
            (each.task, each.slot): run
            for each in meant
            if (run := runs[each.task, each.slot].at(now)) is not None
        }
        by_task = {
            name: [
                (slot, run)
                for slot in slots[name][max(0, bisect_right(slots[name], now) - 3) :]
                if slot <= now
                and (run := runs[name, slot].at(now)) is not None
                and run.state in (RunState.RUNNING, RunState.QUEUED, RunState.RETRYING)
            ]
            for name in {each.task for each in meant}
        }
        present |= {(name, slot): run for name, its in by_task.items() for slot, run in its}
        facts = Facts(now, known, present, active=by_task)
        for each, found in zip(meant, forecasts(facts, meant), strict=True):
            called.setdefault(each, set()).add(found.state)
            if now <= each.deadline - IN_TIME:
                last[each] = found.state
    broken = [each for each in promises if not _is_kept(each, runs)]
    danger = {"late", "at_risk"}
    foreseen = [each for each in broken if last.get(each) in danger]
    false = [each for each in promises if each not in broken and called.get(each, set()) & danger]
    helped = [each for each in false if len(runs[each.task, each.slot].attempts) > 1]
    figures = f"{len(promises)} promises, {len(broken)} broken, {len(foreseen)} foreseen, "
    figures += f"{len(false)} called falsely, {len(helped)} of them were tried again"
    print(figures, [each for each in broken if each not in foreseen], false)
    assert len(foreseen) >= 0.9 * len(broken), figures
    assert len(false) - len(helped) <= 1, figures


def _is_over(promise: Promise, runs: Mapping[Slot, Recorded], now: datetime) -> bool:
    run = runs[promise.task, promise.slot]
    return run.state == RunState.SUCCEEDED and run.ended is not None and run.ended <= now


def _is_kept(promise: Promise, runs: Mapping[Slot, Recorded]) -> bool:
    return _is_over(promise, runs, promise.deadline)
