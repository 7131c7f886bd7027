"""Changes of runs: starts, cancels, retries, acknowledges and redrives them, one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, StringConstraints

from batch_system.batch.ledger.states import StartPriority
from batch_system.operations.asking.results import RunNow, Started
from batch_system.operations.asking.sentences import About
from batch_system.verbs.fields import Instant, Note, Reason, RunName, TaskName
from batch_system.verbs.verb import Verb, post

if TYPE_CHECKING:
    from batch_system.operations.asking.context import Context

LONGEST_KEY = 200
Key = Annotated[
    str,
    StringConstraints(min_length=1, max_length=LONGEST_KEY, pattern=r"^[!-~]([ -~]*[!-~])?$"),
    About("The same key starts a task once: a second request answers with the run of the first."),
]
ItemKey = Annotated[str, Field(max_length=1_000, pattern=r"^[ -~]*$")]


class StartRun(
    Verb,
    role="operator",
    http=post("/tasks/{name}/runs", status=202, headers={"key": "Idempotency-Key"}),
    audit="run.start",
):
    """Queue a run, which a process of the service executes."""

    name: TaskName
    parameters: dict[str, Any] = Field({}, description="The parameters of the task's run().")
    slot: Instant | None = Field(None, description="The instant that the run is for. Default: now.")
    at: Instant | None = Field(
        None, description="When the run begins at the earliest. Default: at once."
    )
    note: Note | None = None
    key: Key | None = None
    debounce: float | None = Field(
        None,
        gt=0,
        description="Seconds: starts with one key are one run, which begins when none of them has "
        "come for this time.",
    )
    at_most: float | None = Field(
        None,
        gt=0,
        description="Seconds by which such a run is postponed at most. Default: 10 × debounce.",
    )
    once_in: float | None = Field(
        None,
        gt=0,
        description="Seconds after a start in which others with its key make no run.",
    )
    priority: StartPriority | None = Field(
        None, description="high: before the others of its queue; low: after them."
    )

    async def perform(self, context: Context) -> Started:
        from batch_system.operations.runs import change

        return await change.start(
            context,
            self.name,
            self.parameters,
            self.slot,
            self.key,
            self.at,
            self.note,
            {"debounce": self.debounce, "at_most": self.at_most, "once_in": self.once_in},
            self.priority,
        )


class CancelRun(Verb, role="operator", http=post("/runs/{run}/cancel"), audit="run.cancel"):
    """Cancel a run: at once if it waits, otherwise by asking its process to stop it."""

    run: RunName
    wait: float = Field(0, ge=0, le=30, description="Seconds to wait for the end of the run.")
    note: Note | None = None

    async def perform(self, context: Context) -> RunNow:
        from batch_system.operations.runs import change

        return await change.cancel(context, self.run, self.wait, self.note)


class RetryRun(Verb, role="operator", http=post("/runs/{run}/retry"), audit="run.retry"):
    """Give a run that has ended a new attempt, which resumes after its last checkpoint."""

    run: RunName
    from_the_beginning: bool = Field(
        False, description="Do everything again, also in a run that has succeeded."
    )
    and_after: bool = Field(
        False, description="Also run again, after it, the runs that have waited for it."
    )
    note: Note | None = None

    async def perform(self, context: Context) -> RunNow:
        from batch_system.operations.runs import change

        return await change.retry(
            context, self.run, self.from_the_beginning, self.and_after, self.note
        )


class AcknowledgeRun(
    Verb, role="operator", http=post("/runs/{run}/acknowledge"), audit="run.acknowledge"
):
    """Say that a person takes care of a failed run. It no longer counts as open, but is not made
    good.
    """

    run: RunName
    note: Reason

    async def perform(self, context: Context) -> RunNow:
        from batch_system.operations.runs import change

        return await change.acknowledge(context, self.run, self.note)


class RedriveRun(
    Verb,
    role="operator",
    http=post("/runs/{run}/redrive", status=202),
    audit="run.redrive",
):
    """Process once more, in a new run, the items that a run has set aside.

    The new run is queued for a running service. Items that fail again are set aside in the new run.
    """

    run: RunName
    items: list[ItemKey] | None = Field(
        None,
        min_length=1,
        max_length=500,
        description="Only items with these keys, as the quarantine lists them. Default: all.",
    )
    note: Note | None = None

    async def perform(self, context: Context) -> Started:
        from batch_system.operations.runs import quarantine

        return await quarantine.redrive(context, self.run, self.items, self.note)
