"""The chain that a run or a task is in: what it comes after, what comes after it, and what it keeps
back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import chains
from batch_system.batch.ledger import runs as known_runs
from batch_system.batch.ledger.run_rows import newest_of_each, run_rows
from batch_system.batch.ledger.schedules import OpenSchedule
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import WAITING_SQL, runs
from batch_system.errors import UnknownRun
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import KeptBack
from batch_system.operations.runs.read import run_of
from batch_system.operations.runs.waiting import Chain, Link, Step, Upcoming

STEPS = 3
"""At most this many steps of a chain are shown on each side."""
MOST_LINKS = 4
"""At most this many names are shown at each step."""
MOST_READ = 200
MOST_MEMBERS = 10_000
MOST_LOOKED = 5_000
MOST_UPCOMING = 10


async def chain(context: Context, given: str) -> Chain:
    """What a run comes after, what comes after it, and what it keeps back. Raises UnknownRun."""
    run = await run_of(context, given)
    async with context.databases.reading() as connection:
        row = await known_runs.get(connection, run) if connection is not None else None
        if connection is None or row is None:
            raise UnknownRun(f"the run {run} was deleted meanwhile")
        kept = (
            await chains.kept_back_by_run(connection, run)
            if row["state"] != RunState.SUCCEEDED
            else []
        )
        return Chain(
            before=await _before(connection, run),
            after=await _after(connection, run),
            keeps_back=[KeptBack(**vars(each)) for each in kept],
        )


async def _before(connection: AsyncConnection, run: str) -> list[Step]:
    steps: list[Step] = []
    asked, seen = [run], {run}
    while asked and len(steps) < STEPS:
        rows = await chains.before(connection, asked, MOST_READ)
        links = _links(rows)
        if asked == [run]:
            members = await chains.members_by_state(connection, run, MOST_MEMBERS)
            links += [
                Link(task=m.task, state=m.state, count=m.number, run=_only(m)) for m in members
            ]
        if links:
            steps.append(_step(links))
        asked = _new(rows, seen)
    return steps[::-1]


def _only(member: Row[Any]) -> str | None:
    return member.id if member.number == 1 else None


async def _after(connection: AsyncConnection, run: str) -> list[Step]:
    steps: list[Step] = []
    asked, seen = [run], {run}
    while asked and len(steps) < STEPS:
        rows = await chains.after(connection, asked, MOST_READ)
        unique = {row.id: row for row in rows if row.id not in seen}
        if unique:
            steps.append(_step(_links(list(unique.values()))))
        asked = _new(rows, seen)
    return steps


def _new(rows: Iterable[Row[Any]], seen: set[str]) -> list[str]:
    """The runs of a step that earlier steps did not have. Marks them as seen."""
    found = list(dict.fromkeys(row.id for row in rows if row.id is not None and row.id not in seen))
    seen.update(found)
    return found


def _links(rows: Sequence[Row[Any]]) -> list[Link]:
    """One link for the runs of a task in one state."""
    by_state: dict[tuple[str, str | None], list[Row[Any]]] = defaultdict(list)
    for row in rows:
        by_state[row.task, row.state].append(row)
    links = []
    for (task, state), its in sorted(
        by_state.items(), key=lambda item: (item[0][0], item[0][1] or "")
    ):
        only = its[0] if len(its) == 1 else None
        run, slot = (only.id, only.slot) if only is not None else (None, None)
        links.append(Link(task=task, state=state, count=len(its), run=run, slot=slot))
    return links


def _step(links: Sequence[Link]) -> Step:
    return Step(links=links[:MOST_LINKS], more=max(0, len(links) - MOST_LINKS))


async def of_task(
    connection: AsyncConnection, name: str, opened: Mapping[str, OpenSchedule]
) -> Chain:
    """The tasks that a task comes after and those that come after it, each with its last run.

    `opened`: the schedules that tasks have now.
    """
    upstreams = {task: _named(row) for task, row in opened.items() if row.after}
    followers: dict[str, list[str]] = defaultdict(list)
    for task, names in upstreams.items():
        for each in names:
            followers[each].append(task)
    before = _walk(name, lambda task: upstreams.get(task, ()))
    after = _walk(name, lambda task: followers.get(task, ()))
    if not before and not after:
        return Chain()
    shown = {task for step in (*before, *after) for task in step[:MOST_LINKS]}
    rows = await newest_of_each(connection, sorted(shown), ("id", "task", "state", "slot"), 1)
    last = {row.task: row for row in rows}
    return Chain(
        before=[_named_step(step, last) for step in reversed(before)],
        after=[_named_step(step, last) for step in after],
    )


def _named(row: OpenSchedule) -> Sequence[str]:
    names = row.after.get("tasks") if isinstance(row.after, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def _walk(name: str, following: Callable[[str], Iterable[str]]) -> list[list[str]]:
    """The names at each step from a task."""
    steps: list[list[str]] = []
    seen, asked = {name}, [name]
    while len(steps) < STEPS:
        asked = sorted({other for task in asked for other in following(task)} - seen)
        if not asked:
            break
        seen.update(asked)
        steps.append(asked)
    return steps


def _named_step(names: Sequence[str], last: Mapping[str, Row[Any]]) -> Step:
    links = []
    for name in names[:MOST_LINKS]:
        row = last.get(name)
        state, run, slot = (row.state, row.id, row.slot) if row is not None else (None, None, None)
        links.append(Link(task=name, state=state, run=run, slot=slot))
    return Step(links=links, more=max(0, len(names) - MOST_LINKS))


async def upcoming(connection: AsyncConnection, task: str, now: datetime) -> list[Upcoming]:
    """The next runs of a task that wait for an instant, among the next 5,000 such runs of all
    tasks.
    """
    waiting = run_rows(
        ("id", "task", "due_at", "requested_by"), WAITING_SQL, runs.c.due_at > now
    ).order_by(runs.c.due_at, runs.c.id)
    hinted = (
        waiting.with_hint(runs, "INDEXED BY ix_batch_runs_waits", "sqlite")
        .limit(MOST_LOOKED)
        .subquery()
    )
    query = (
        select(hinted)
        .where(hinted.c.task == task)
        .order_by(hinted.c.due_at, hinted.c.id)
        .limit(MOST_UPCOMING)
    )
    rows = await connection.execute(query)
    return [Upcoming(id=row.id, at=row.due_at, requested_by=row.requested_by) for row in rows]
