"""Which run or task a person means by what was typed: a run's id, the beginning of one, or a task's name."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.firing import task_sync
from service.batch.ledger import runs as run_rows
from service.errors import UnknownRun, UnknownTask
from service.escaping import echoed
from service.operations.context import Context

SHORTEST = 6
"""So many digits of a run's id have to be given, at least."""

CANDIDATES = 10
"""So many runs are named where several have ids that begin as was typed."""


class Meant(NamedTuple):
    """A run's id, or a task's name."""

    kind: Literal["run", "task"]
    name: str


async def meant(context: Context, given: str) -> Meant:
    """The run or the task that `given` means. Raises UnknownRun, also where several ids begin so, and UnknownTask.

    Tasks are looked for in the ledger first, and then among the loaded ones.
    """
    digits = given.lower().replace("-", "")
    is_id = re.fullmatch(r"[0-9a-f]{1,32}", digits) is not None
    names: set[str] = set()
    async with context.databases.reading() as connection:
        if connection is not None:
            if is_id and len(digits) == 32 and (run := await _beginning_with(connection, digits)):
                return Meant("run", run)
            names = set(await task_sync.known(connection))
            if given in names:
                return Meant("task", given)
            if is_id and len(digits) >= SHORTEST and (run := await _beginning_with(connection, digits)):
                return Meant("run", run)
    names |= context.loaded().tasks.keys()
    if given in names:
        return Meant("task", given)
    listed = ", ".join(sorted(names)) or "none"
    if is_id:
        raise UnknownRun(
            f"no run has the id {echoed(given)}, or one that begins so (at least {SHORTEST} digits are needed), "
            f"and no task is named so; the tasks are: {listed}"
        )
    raise UnknownTask(f"no task is named {echoed(given)}, and no run has such an id; the tasks are: {listed}")


async def run_of(context: Context, given: str) -> str:
    """The id of the run that is meant; of a task, its newest one. Raises UnknownRun or UnknownTask."""
    kind, name = await meant(context, given)
    if kind == "run":
        return name
    async with context.databases.reading() as connection:
        newest = await run_rows.latest(connection, name) if connection is not None else None
    if newest is None:
        raise UnknownRun(f"the task {echoed(name)} has no run yet")
    return newest


async def only_run(connection: AsyncConnection | None, given: str) -> str:
    """The id of the run whose id is `given`, or begins so; `connection`: None where there is no ledger yet.

    Raises UnknownRun, also where several ids begin so.
    """
    digits = given.lower().replace("-", "")
    is_long_enough = re.fullmatch(rf"[0-9a-f]{{{SHORTEST},32}}", digits) is not None
    if connection is not None and is_long_enough and (run := await _beginning_with(connection, digits)):
        return run
    raise UnknownRun(
        f"no run has the id {echoed(given)}, or one that begins so (at least {SHORTEST} digits are needed); "
        "`batch runs` lists them"
    )


async def _beginning_with(connection: AsyncConnection, digits: str) -> str | None:
    runs = await run_rows.begin_with(connection, digits, CANDIDATES + 1)
    if len(runs) > 1:
        shown = "; ".join(f"{run['id']} ({run['task']}, {run['state']})" for run in runs[:CANDIDATES])
        more = ", and more" if len(runs) > CANDIDATES else ""
        raise UnknownRun(f"several runs have ids that begin with {echoed(digits)}: {shown}{more}")
    return runs[0]["id"] if runs else None


async def refuse_unknown_task(connection: AsyncConnection | None, task: str) -> None:
    """Raises UnknownTask where the ledger has never seen the task."""
    names = sorted(await task_sync.known(connection)) if connection is not None else []
    if task not in names:
        raise UnknownTask(f"the ledger knows no task {echoed(task)}; it knows: {', '.join(names) or 'none'}")
