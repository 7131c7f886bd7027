"""Incidents: lists and shows them, acknowledges them, and mutes tasks."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Path, Query
from pydantic import Field

from service.batch.ledger.states import IncidentKind
from service.batch.tasks.declaration import NAME
from service.operations.asking.cursors import Cursor
from service.operations.asking.filter import ID, TASK_NAME, Instant
from service.operations.asking.results import Result
from service.operations.incidents.facet import (
    MOST_INCIDENTS,
    Acknowledged,
    Incident,
    IncidentDetails,
    IncidentPage,
    Muted,
    SentTest,
)
from service.web.v1.requests import (
    Admin,
    Body,
    NeededNote,
    Note,
    Operator,
    TaskName,
    Viewer,
    router,
)

incidents = router("incidents")

IncidentId = Annotated[str, Path(pattern=ID, description="The id of the incident.")]


class IncidentQuery(Body):
    """Which incidents are wanted."""

    state: Literal["open", "closed", "all"] = "open"
    kind: IncidentKind | None = None
    task: str | None = Field(None, pattern=TASK_NAME)
    limit: int = Field(50, ge=1, le=MOST_INCIDENTS)
    after: Cursor | None = None


class Acknowledgement(Body):
    """That a person takes care of an incident, and why."""

    note: NeededNote
    quiet_until: Instant | None = Field(
        None, description="Until then, 7 days at most, the same error opens no other incident."
    )
    failed_until: Instant | None = Field(
        None,
        description="Acknowledge only the runs that had failed by then, "
        "such as the `last_at` of the incident.",
    )


class Mute(Body):
    """Until when nothing is sent about a task."""

    until: Instant = Field(description="After now, and within the next 31 days.")
    note: Note = None


class Unmuted(Result):
    """Whether the task was muted."""

    was_muted: bool


class AlertTest(Body):
    """The channels that a test message goes to; none for all."""

    channels: list[Annotated[str, Field(pattern=rf"^{NAME.pattern}(/[0-9]{{1,4}})?$")]] = Field(
        [], max_length=20
    )


@incidents.get("/incidents")
async def list_incidents(
    operations: Viewer, query: Annotated[IncidentQuery, Query()]
) -> IncidentPage:
    """A page of the incidents, the newest first."""
    return await operations.incidents.list(**query.model_dump())


@incidents.get("/incidents/{incident}")
async def show_incident(operations: Viewer, incident: IncidentId) -> IncidentDetails:
    """An incident, and what its failed runs keep back."""
    return await operations.incidents.show(incident)


@incidents.post("/incidents/{incident}/acknowledge")
async def acknowledge_incident(
    operations: Operator, incident: IncidentId, body: Acknowledgement
) -> Acknowledged:
    """Say that a person takes care of an incident. Its failed runs no longer count as open."""
    return await operations.incidents.acknowledge(
        incident, body.note, body.quiet_until, body.failed_until
    )


@incidents.post("/incidents/{incident}/reopen")
async def reopen_incident(operations: Operator, incident: IncidentId) -> Incident:
    """Undo an acknowledgement."""
    return await operations.incidents.reopen(incident)


@incidents.post("/tasks/{name}/mute")
async def mute_task(operations: Operator, name: TaskName, body: Mute) -> Muted:
    """Send nothing about a task until an instant. Incidents are opened as ever."""
    return await operations.incidents.mute(name, body.until, body.note)


@incidents.post("/tasks/{name}/unmute")
async def unmute_task(operations: Operator, name: TaskName) -> Unmuted:
    """Send messages about a task again."""
    return Unmuted(was_muted=await operations.incidents.unmute(name))


@incidents.post("/alerts/test", status_code=202)
async def test_alerts(operations: Admin, body: AlertTest) -> SentTest:
    """Write a test message to the channels of the settings, which the service sends."""
    return await operations.incidents.send_test(body.channels)
