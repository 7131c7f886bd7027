"""Reads runs: finds the run or the task that a text means, lists runs page by page, and reads one
with its attempts, its parts and the end of its log.
"""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import attempts as attempt_rows
from batch_system.batch.ledger import database_time, nodes, run_ids, run_logs, schedules
from batch_system.batch.ledger import parts as part_rows
from batch_system.batch.ledger import runs as run_rows
from batch_system.batch.ledger import tasks as task_rows
from batch_system.batch.ledger.parts import PartsGate, Tally
from batch_system.batch.ledger.states import RunState
from batch_system.errors import UnknownRun, UnknownTask
from batch_system.escaping import echoed
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import (
    Attempt,
    Line,
    Node,
    PartShort,
    PartsOfRun,
    RunDetails,
    RunNow,
)
from batch_system.operations.people.redacting import (
    redacted,
)
from batch_system.operations.runs.results import LAST_LINES, RunOrTask

FEWEST_DIGITS = 6
"""How many digits of a run's id have to be given at least."""

MOST_NAMED = 10
"""How many runs an error names at most if several ids begin with the given digits."""


MOST_PARTS = 200
"""How many parts of a run are listed with it, at most."""


async def run_or_task(context: Context, given: str) -> RunOrTask:
    """The run or the task that `given` means.

    Tasks are looked for in the ledger first, and then among the loaded tasks. Raises UnknownTask,
    and UnknownRun, also if several ids begin with `given` or end in it.
    """
    digits = given.lower().replace("-", "")
    is_id = re.fullmatch(r"[0-9a-f]{1,32}", digits) is not None
    names: set[str] = set()
    async with context.databases.reading() as connection:
        if connection is not None:
            if is_id and len(digits) == 32 and (run := await _run_with_digits(connection, digits)):
                return RunOrTask(kind="run", name=run)
            names = set(await task_rows.known(connection))
            if given in names:
                return RunOrTask(kind="task", name=given)
            if (
                is_id
                and len(digits) >= FEWEST_DIGITS
                and (run := await _run_with_digits(connection, digits))
            ):
                return RunOrTask(kind="run", name=run)
    names |= context.loaded().tasks.keys()
    if given in names:
        return RunOrTask(kind="task", name=given)
    listed = ", ".join(sorted(names)) or "none"
    if is_id:
        raise UnknownRun(
            f"no run has the id {echoed(given)}, or an id that begins with it or ends in it (at "
            f"least {FEWEST_DIGITS} digits are needed), and no task has that name; the tasks are: "
            f"{listed}"
        )
    raise UnknownTask.named(given, names, "no task is named {}, and it is no id of a run")


async def run_of(context: Context, given: str) -> str:
    """The id of the run that `given` means; of a task, the id of its newest run. Raises UnknownRun
    or UnknownTask.
    """
    found = await run_or_task(context, given)
    if found.kind == "run":
        return found.name
    name = found.name
    async with context.databases.reading() as connection:
        newest = await run_rows.latest(connection, name) if connection is not None else None
    if newest is None:
        raise UnknownRun(f"the task {echoed(name)} has no run yet")
    return newest


async def _run_with_digits(connection: AsyncConnection, digits: str) -> str | None:
    """The only run whose id begins with these digits, or ends in them. Raises UnknownRun if there
    are several.
    """
    for where in ("begin with", "end in"):
        find = run_ids.begin_with if where == "begin with" else run_ids.end_in
        runs = await find(connection, digits, MOST_NAMED + 1)
        if len(runs) > 1:
            named = "; ".join(
                f"{run['id']} ({run['task']}, {run['state']})" for run in runs[:MOST_NAMED]
            )
            more = ", and more" if len(runs) > MOST_NAMED else ""
            raise UnknownRun(f"several runs have ids that {where} {echoed(digits)}: {named}{more}")
        if runs:
            return str(runs[0]["id"])
    return None


async def refuse_unknown_task(connection: AsyncConnection | None, task: str) -> None:
    """Raises UnknownTask if the ledger has no task of this name."""
    names = await task_rows.known(connection) if connection is not None else {}
    if task not in names:
        raise UnknownTask.named(task, names, "the ledger knows no task {}", "it knows:")


async def details_of(
    connection: AsyncConnection, run_id: str, last_lines: int = LAST_LINES
) -> RunDetails:
    """The details of a run, with this many last lines of its log. Raises UnknownRun."""
    row = await row_of(connection, run_id)
    spans = await schedules.history(connection, row["task"])
    node = await nodes.get(connection, row["node"]) if row["node"] else None
    fields: dict[str, Any] = {
        "timezone": spans[-1]["timezone"] if spans else None,
        "node": Node.of(node) if node else None,
        "attempts": [
            Attempt.of(attempt) for attempt in await attempt_rows.of_run(connection, run_id)
        ],
        "log": [Line.of(vars(line)) for line in await run_logs.tail(connection, run_id, last_lines)]
        if last_lines
        else [],
        "parts": await _parts_of(connection, row),
    }
    if row["state"] == RunState.WAITING and (parts := fields["parts"]) is not None:
        fields |= {"count": parts.count, "total": parts.total}
    return RunDetails.at({**row, **fields}, await database_time.now_of(connection))


async def _parts_of(connection: AsyncConnection, row: dict[str, Any]) -> PartsOfRun | None:
    if row["gate"] not in tuple(PartsGate):
        return None
    tally = (await part_rows.tallies(connection, [row["id"]])).get(row["id"], Tally({}))
    listed = [
        PartShort.of(part._mapping)
        for part in await part_rows.of_run(connection, row["id"], MOST_PARTS)
    ]
    order = await part_rows.states_in_order(connection, row["id"], tally.number, MOST_PARTS)
    return PartsOfRun(
        number=tally.number,
        states=dict(tally.states),
        count=tally.count,
        total=tally.total,
        order=[str(state) for state in order],
        parts=listed,
    )


async def row_of(connection: AsyncConnection, run_id: str) -> dict[str, Any]:
    """The row of a run by column name. Raises UnknownRun."""
    row = await run_rows.get(connection, run_id)
    if row is None:
        raise UnknownRun(f"the run {run_id} was deleted just now")
    return row


async def get(context: Context, run_id: str) -> RunNow | None:
    """A run as it is now, by its whole id; None if there is no such run."""
    async with context.databases.reading() as connection:
        row = await run_rows.get(connection, run_id) if connection is not None else None
        if row is None or connection is None:
            return None
        now = await database_time.now_of(connection)
        return await redacted(connection, context, RunNow.at({**row, "now": now}, now))


async def current(context: Context, run_id: str) -> RunNow:
    """A run as it is now, by its whole id. Raises UnknownRun."""
    now = await get(context, run_id)
    if now is None:
        raise UnknownRun(f"the run {run_id} was deleted meanwhile")
    return now


async def show(context: Context, given: str, last_lines: int = LAST_LINES) -> RunDetails:
    """The details of one run, with this many last lines of its log. Raises UnknownRun."""
    run = await run_of(context, given)
    async with context.databases.reading() as connection:
        assert connection is not None
        details = await details_of(connection, run, last_lines)
        return await redacted(connection, context, details)
