"""`batch why`. Alone, because `batch` imports the module of a command only to run it or to show its
help.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from batch_system.cli import complete
from batch_system.cli.opening import ask
from batch_system.cli.options import AsJson
from batch_system.errors import UnknownIncident, UnknownRun, UnknownTask

if TYPE_CHECKING:
    from batch_system.operations.why.results import Why
    from batch_system.verbs.following import Operations

Given = Annotated[
    str,
    typer.Argument(
        metavar="RUN|TASK|INCIDENT",
        help="The id of a run, at least 6 digits of its beginning or end; the name of a task; or "
        "the id of an incident, or its last digits.",
        autocompletion=complete.task_names,
    ),
]


def why(given: Given, as_json: AsJson = False) -> None:
    """Say why a run, a task or an incident is as it is.

    For a failure, the last good run is compared with the bad one: what differs between their
    versions, settings, parameters, schedules and logs. For what has not run, it says what holds it:
    a pause, another run, or that no process has the task. The last line has the commands that help.
    """
    from batch_system import console
    from batch_system.operations.why.text import lines_of

    answer = ask(lambda operations: _answer(operations, given), needs_tasks=False)
    if as_json:
        console.show_json(answer)
        return
    for line in lines_of(answer):
        console.write(line)


async def _answer(operations: Operations, given: str) -> Why:
    """The answer about the run or the task that a text means, or else about the incident."""
    from batch_system.verbs.runs import FindRunOrTask
    from batch_system.verbs.why import WhyIncident, WhyRun, WhyTask

    try:
        found = await operations(FindRunOrTask(given=given))
    except (UnknownRun, UnknownTask):
        if not re.fullmatch(r"[0-9a-f-]{4,36}", given):
            raise
        try:
            return await operations(WhyIncident(incident=given))
        except UnknownIncident:
            pass
        raise
    if found.kind == "task":
        return await operations(WhyTask(name=found.name))
    return await operations(WhyRun(run=found.name))
