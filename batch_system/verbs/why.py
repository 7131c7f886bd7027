"""Why: why a run, a task or an incident is as it is, and what differs from when it last worked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from batch_system.operations.why.results import Why
from batch_system.operations.why.text import lines_of
from batch_system.verbs.fields import IncidentId, RunName, TaskName
from batch_system.verbs.verb import Verb, get

if TYPE_CHECKING:
    from batch_system.operations.asking.context import Context

_ABOUT = (
    "The last good run is the newest one that succeeded before the error began. The two runs are "
    "compared by version, task file, policies, settings, parameters, schedule, clock, host, "
    "duration, and the kinds of lines in their logs."
)


def _text(why: Why) -> Iterator[str]:
    for each in lines_of(why):
        yield f"{each}\n"


class WhyRun(Verb, role="viewer", http=get("/runs/{run}/why", tag="why", text=_text, about=_ABOUT)):
    """Say why a run failed, was skipped or cancelled, or still waits, and what differs from the
    last good run.
    """

    run: RunName

    async def perform(self, context: Context) -> Why:
        from batch_system.operations.why import why

        return await why.of_run(context, self.run)


class WhyTask(Verb, role="viewer", http=get("/tasks/{name}/why", tag="why", text=_text)):
    """Say why a task fails or does not run: its open incidents first, then what holds it up."""

    name: TaskName

    async def perform(self, context: Context) -> Why:
        from batch_system.operations.why import why

        return await why.of_task(context, self.name)


class WhyIncident(
    Verb, role="viewer", http=get("/incidents/{incident}/why", tag="why", text=_text)
):
    """Say why an incident was opened, and compare its first failed run with the last good one."""

    incident: IncidentId

    async def perform(self, context: Context) -> Why:
        from batch_system.operations.why import why

        return await why.of_incident(context, self.incident)
