"""Tasks: lists and shows them, starts runs, pauses, resumes and backfills."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Header, Query
from pydantic import Field

from service.batch.ledger.states import Origin, RunState
from service.operations.asking.cursors import Cursor
from service.operations.asking.filter import ID, Instant, RunFilter
from service.operations.asking.results import Result, Slot, Started
from service.operations.bulks.bulk import Bulk, Preview
from service.operations.runs.read import MOST_RUNS, RunPage
from service.operations.starting.backfill import BackfillRequest
from service.operations.tasks.results import Paused, Resumed, ResumedAhead, TaskDetails, TaskSummary
from service.settings.pools import POOL_NAME
from service.web.v1.requests import Body, Note, Operator, TaskName, Viewer, WithNote, router

tasks = router("tasks")

LONGEST_KEY = 200
POOL = f"^{POOL_NAME.pattern}$"


class TaskList(Result):
    """The tasks that a process of the service has loaded, and the files that can't be used."""

    tasks: list[TaskSummary]


class Start(Body):
    """A run to start."""

    parameters: dict[str, Any] = Field({}, description="The parameters of the task's run().")
    slot: Instant | None = Field(None, description="The instant that the run is for. Default: now.")
    at: Instant | None = Field(
        None, description="When the run begins at the earliest. Default: at once."
    )
    note: Note = Field(None, description="Why. It is recorded with the start.")


class Slots(Result):
    """The next slots of a task; empty without a schedule and during a pause."""

    slots: list[Slot]


class Pause(WithNote):
    """A pause of a task."""

    until: Instant | None = Field(
        None, description="When the pause ends by itself: after now. Null: never."
    )


class Backfill(Body):
    """A backfill of the slots from `since` to `until`, both included. It needs a preview first."""

    since: Instant
    until: Instant
    redo: bool = Field(
        False, description="Also give runs that have ended a new attempt from the beginning."
    )
    many: bool = Field(False, description="Allow more than 10,000 slots.")
    and_after: bool = Field(
        False, description="Also backfill the slots of the tasks that come after."
    )


class BackfillStart(Body):
    """A backfill that begins."""

    preview: str = Field(pattern=ID, description="The id of the preview.")
    note: Note = None


@tasks.get("/tasks")
async def list_tasks(
    operations: Viewer,
    pool: Annotated[str | None, Query(pattern=POOL, description="Only tasks of this pool.")] = None,
) -> TaskList:
    """All tasks that a process of the service has loaded, by name."""
    listed = await operations.tasks.list(with_others=True)
    return TaskList(
        tasks=[
            task for task in listed if pool is None or (task.error is None and task.pool == pool)
        ]
    )


@tasks.get("/tasks/{name}")
async def show_task(operations: Viewer, name: TaskName) -> TaskDetails:
    """A task: schedule, next slots, policies, parameters, newest runs and missed ranges."""
    return await operations.tasks.show(name)


@tasks.get("/tasks/{name}/schedule")
async def next_slots(
    operations: Viewer, name: TaskName, n: Annotated[int, Query(ge=1, le=1_000)] = 10
) -> Slots:
    """The next slots of a task."""
    return Slots(slots=list(await operations.tasks.next_slots(name, n)))


class RunsOfTask(Body):
    """Which runs of a task are wanted."""

    state: list[RunState] = Field(
        [], max_length=len(RunState), description="Only runs in one of these states."
    )
    origin: list[Origin] = Field(
        [], max_length=len(Origin), description="Only runs of one of these origins."
    )
    slot_since: Instant | None = Field(None, description="Only runs of this slot or later ones.")
    slot_until: Instant | None = Field(None, description="Only runs of slots before this instant.")
    order: Literal["created", "slot"] = Field(
        "slot", description="By slot, manual runs are left out."
    )
    limit: int = Field(50, ge=1, le=MOST_RUNS, description="How many runs the page has at most.")
    after: Cursor | None = Field(None, description="The cursor that the page before has given.")


@tasks.get("/tasks/{name}/runs")
async def list_runs_of_task(
    operations: Viewer, name: TaskName, query: Annotated[RunsOfTask, Query()]
) -> RunPage:
    """A page of the runs of a task, the newest slot first."""
    conditions = query.model_dump(exclude={"order", "limit", "after"}, exclude_defaults=True)
    wanted = RunFilter(task=name, **conditions)
    return await operations.runs.list(
        wanted, query.limit, query.after, by_slot=query.order == "slot"
    )


@tasks.post("/tasks/{name}/runs", status_code=202)
async def start_run(
    operations: Operator,
    name: TaskName,
    body: Start,
    key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            min_length=1,
            max_length=LONGEST_KEY,
            pattern=r"^[!-~]([ -~]*[!-~])?$",
            description="The same key starts a task once: "
            "a second request answers with the run of the first.",
        ),
    ] = None,
) -> Started:
    """Queue a run, which a process of the service executes."""
    return await operations.runs.start(name, body.parameters, body.slot, key, body.at, body.note)


@tasks.post("/tasks/{name}/pause")
async def pause_task(operations: Operator, name: TaskName, body: Pause | None = None) -> Paused:
    """Stop firing a task. Of an existing pause only the end is changed, if one is given."""
    return await operations.tasks.pause(
        name, body.note if body else None, body.until if body else None
    )


@tasks.post("/tasks/resume")
async def resume_tasks_ahead(operations: Operator, body: WithNote | None = None) -> ResumedAhead:
    """Fire all tasks again that don't fire because a clock was ahead. Paused tasks stay paused."""
    return ResumedAhead(
        tasks=dict(await operations.tasks.resume_ahead(body.note if body else None))
    )


@tasks.post("/tasks/{name}/resume")
async def resume_task(
    operations: Operator, name: TaskName, body: WithNote | None = None
) -> Resumed:
    """Fire a task again from now on, which was paused, or which does not fire because a clock was
    ahead.
    """
    return await operations.tasks.resume(name, body.note if body else None)


@tasks.post("/tasks/{name}/backfill/preview")
async def preview_backfill(operations: Operator, name: TaskName, body: Backfill) -> Preview:
    """How many runs a backfill would make. The preview is good for an hour, and nothing is
    changed.
    """
    request = BackfillRequest(
        name, body.since, body.until, body.redo, body.many, and_after=body.and_after
    )
    return await operations.bulks.preview_backfill(request)


@tasks.post("/tasks/{name}/backfill", status_code=202)
async def begin_backfill(operations: Operator, name: TaskName, body: BackfillStart) -> Bulk:
    """Make the runs of a preview. It is refused if the task has another schedule by now."""
    return await operations.bulks.begin(body.preview, "backfill", body.note, task=name)
