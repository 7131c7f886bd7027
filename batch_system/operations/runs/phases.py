"""What a run has done so far: how it waited, its attempts with their nodes, what is expected, and
what it started.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.context.progress import pace
from batch_system.batch.incidents.durations import UsualDurations
from batch_system.batch.ledger import attempts as attempt_rows
from batch_system.batch.ledger import database_time, json_rows
from batch_system.batch.ledger import runs as known_runs
from batch_system.batch.ledger.run_rows import NEWEST_FIRST, run_rows
from batch_system.batch.ledger.states import FINAL, RunState
from batch_system.batch.ledger.tables import NO_PART_SQL, nodes, runs
from batch_system.errors import UnknownRun
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import Result
from batch_system.operations.people.redacting import hidden_tasks
from batch_system.operations.runs.read import run_of

MOST_PHASES = 25
"""At most this many phases are listed: the newest ones."""
MOST_CHILDREN = 50
SHORT = timedelta(milliseconds=500)
"""A shorter wait is not listed."""

Kind = Literal["wait", "attempt", "backoff", "parts"]
"""`parts`: it waits for its parts."""


class Phase(Result):
    """A part of the life of a run. `end`: None while it goes on. `outcome`: how the attempt ended,
    as a word.

    `number`, `node`, `fence` and `error`: of an attempt.
    """

    kind: Kind
    begin: datetime
    end: datetime | None
    number: int | None = None
    node: str | None = None
    fence: int | None = None
    outcome: str | None = None
    error: str | None = None


class Child(Result):
    """A run that this one has started."""

    id: str
    task: str
    state: str
    created_at: datetime


class RunStory(Result):
    """`left_out`: how many older phases are not told. `expected`: about when a running run ends;
    None: not known.
    """

    now: datetime
    phases: list[Phase]
    left_out: int
    expected: datetime | None
    children: list[Child]


async def story(context: Context, given: str) -> RunStory:
    """How a run waited, its attempts with their nodes, what is expected, and what it started.
    Raises UnknownRun.
    """
    run = await run_of(context, given)
    async with context.databases.reading() as connection:
        row = await known_runs.get(connection, run) if connection is not None else None
        if connection is None or row is None:
            raise UnknownRun(f"the run {run} was deleted meanwhile")
        now = await database_time.now_of(connection)
        ended = await attempt_rows.of_run(connection, run)
        hosts = await _hosts(connection, {each["node"] for each in ended} | {row["node"]})
        hides = row["task"] in await hidden_tasks(connection, context)
        phases = _phases(row, ended, hosts, hides)
        return RunStory(
            now=now,
            phases=phases[-MOST_PHASES:],
            left_out=max(0, len(phases) - MOST_PHASES),
            expected=await _expected(connection, row, now),
            children=await children(connection, run),
        )


async def _hosts(connection: AsyncConnection, wanted: set[str | None]) -> dict[str, str]:
    ids = sorted(each for each in wanted if each)
    if not ids:
        return {}
    among = json_rows.is_among(nodes.c.id, ids, connection.dialect.name)
    return {
        row.id: row.host
        for row in await connection.execute(select(nodes.c.id, nodes.c.host).where(among))
    }


def _phases(
    row: Mapping[str, Any],
    ended: Sequence[Mapping[str, Any]],
    hosts: Mapping[str, str],
    hides: bool,
) -> list[Phase]:
    phases: list[Phase] = []
    at, waits = row["created_at"], _WAIT
    for each in ended:
        _wait(phases, waits, at, each["started_at"])
        phases.append(
            Phase(
                kind="attempt",
                begin=each["started_at"],
                end=each["ended_at"],
                number=each["number"],
                node=hosts.get(each["node"] or ""),
                fence=each["fence"],
                outcome=each["outcome"],
                error=None if hides else _error_in(each["error"]),
            )
        )
        at, waits = each["ended_at"], _PARTS if each["outcome"] == "split" else _BACKOFF
    if row["state"] == RunState.RUNNING and row["attempt_started_at"] is not None:
        begin = max(at, row["attempt_started_at"])
        _wait(phases, waits, at, begin)
        node = hosts.get(row["node"] or "")
        phases.append(
            Phase(kind="attempt", begin=begin, end=None, number=row["attempt"], node=node)
        )
    elif row["state"] == RunState.RETRYING:
        phases.append(Phase(kind="backoff", begin=at, end=row["due_at"]))
    elif row["state"] not in FINAL:
        phases.append(Phase(kind=_PARTS if waits == _PARTS else _WAIT, begin=at, end=None))
    elif waits != _BACKOFF and row["finished_at"] is not None:
        phases.append(Phase(kind=waits, begin=at, end=row["finished_at"]))
    return phases


_WAIT: Kind = "wait"
_BACKOFF: Kind = "backoff"
_PARTS: Kind = "parts"


def _wait(phases: list[Phase], kind: Kind, begin: datetime, end: datetime) -> None:
    if end - begin >= SHORT:
        phases.append(Phase(kind=kind, begin=begin, end=end))


def _error_in(error: Any) -> str | None:
    if not isinstance(error, dict):
        return None
    return f"{error.get('type', '')}: {error.get('message', '')}"


async def _expected(
    connection: AsyncConnection, row: Mapping[str, Any], now: datetime
) -> datetime | None:
    """About when the run ends: by its rate, or else by the duration that half of the runs stay
    within.
    """
    if row["state"] != RunState.RUNNING or row["attempt_started_at"] is None:
        return None
    rate, eta = pace(row, now)
    if rate and row["total"] is not None:
        return eta
    usual = (await UsualDurations(connection, now).of_task(row["task"])).p50
    end: datetime = row["attempt_started_at"] + timedelta(seconds=usual or 0.0)
    return end if end > now else None


async def children(connection: AsyncConnection, run: str) -> list[Child]:
    """The newest runs that the code of this one has started, without its parts."""
    names = ("id", "task", "state", "created_at")
    query = run_rows(names, runs.c.parent == run, "parent IS NOT NULL", NO_PART_SQL)
    newest = query.order_by(*NEWEST_FIRST).limit(MOST_CHILDREN)
    return [Child.of(each) for each in (await connection.execute(newest)).mappings()]
