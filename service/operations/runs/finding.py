"""Finds the run or the task that a text means: the id of a run, its beginning or end, or the name
of a task.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.firing import task_sync
from service.batch.ledger import run_ids
from service.batch.ledger import runs as run_rows
from service.errors import UnknownRun, UnknownTask
from service.escaping import echoed
from service.operations.asking.context import Context

FEWEST_DIGITS = 6
"""How many digits of a run's id have to be given at least."""

MOST_NAMED = 10
"""How many runs an error names at most if several ids begin with the given digits."""


class RunOrTask(NamedTuple):
    """A run or a task. `name`: the whole id of the run, or the name of the task."""

    kind: Literal["run", "task"]
    name: str


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
                return RunOrTask("run", run)
            names = set(await task_sync.known(connection))
            if given in names:
                return RunOrTask("task", given)
            if (
                is_id
                and len(digits) >= FEWEST_DIGITS
                and (run := await _run_with_digits(connection, digits))
            ):
                return RunOrTask("run", run)
    names |= context.loaded().tasks.keys()
    if given in names:
        return RunOrTask("task", given)
    listed = ", ".join(sorted(names)) or "none"
    if is_id:
        raise UnknownRun(
            f"no run has the id {echoed(given)}, or an id that begins with it or ends in it (at "
            f"least {FEWEST_DIGITS} "
            f"digits are needed), and no task has that name; the tasks are: {listed}"
        )
    raise UnknownTask.named(given, names, "no task is named {}, and it is no id of a run")


async def run_of(context: Context, given: str) -> str:
    """The id of the run that `given` means; of a task, the id of its newest run. Raises UnknownRun
    or UnknownTask.
    """
    kind, name = await run_or_task(context, given)
    if kind == "run":
        return name
    async with context.databases.reading() as connection:
        newest = await run_rows.latest(connection, name) if connection is not None else None
    if newest is None:
        raise UnknownRun(f"the task {echoed(name)} has no run yet")
    return newest


async def _run_with_digits(connection: AsyncConnection, digits: str) -> str | None:
    """The only run whose id begins with these digits, or ends in them. Raises UnknownRun if there
    are several.
    """
    for where, find in {"begin with": run_ids.begin_with, "end in": run_ids.end_in}.items():
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
    names = await task_sync.known(connection) if connection is not None else {}
    if task not in names:
        raise UnknownTask.named(task, names, "the ledger knows no task {}", "it knows:")
