"""Incidents: lists and shows what needs a person, acknowledges it, and tries the channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from batch_system.batch.ledger.states import IncidentKind
from batch_system.operations.incidents.results import (
    MOST_INCIDENTS,
    Acknowledged,
    Incident,
    IncidentDetails,
    IncidentPage,
    MessagePage,
    SentTest,
)
from batch_system.verbs.fields import Ahead, Cursor, IncidentId, Instant, Reason, TaskName
from batch_system.verbs.verb import Verb, get, post

if TYPE_CHECKING:
    from batch_system.operations.asking.context import Context

Channel = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}(/[0-9]{1,4})?$")]


class ListIncidents(Verb, role="viewer", http=get("/incidents")):
    """List what needs a person, the newest first, a page at a time.

    An incident lasts from its first failure, or whatever else it is about, until that is made good
    or acknowledged.
    """

    state: Literal["open", "closed", "all"] = Field("open", description="Which incidents.")
    kind: IncidentKind | None = Field(None, description="Only incidents of this kind.")
    task: TaskName | None = Field(None, description="Only incidents of this task.")
    owner: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="Only incidents of the tasks of this owner: the whole text, or a word of it.",
    )
    limit: int = Field(
        50, ge=1, le=MOST_INCIDENTS, description="How many incidents the page has at most."
    )
    after: Cursor | None = None

    async def perform(self, context: Context) -> IncidentPage:
        from batch_system.operations.incidents import read

        return await read.list_incidents(
            context, self.state, self.kind, self.task, self.owner, self.limit, self.after
        )


class ShowIncident(Verb, role="viewer", http=get("/incidents/{incident}")):
    """Show an incident, and what its failed runs keep back."""

    incident: IncidentId

    async def perform(self, context: Context) -> IncidentDetails:
        from batch_system.operations.incidents import read

        return await read.show(context, self.incident)


class AcknowledgeIncident(
    Verb,
    role="operator",
    http=post("/incidents/{incident}/acknowledge"),
    audit="incident.acknowledge",
):
    """Say that a person takes care of an incident. Its failed runs no longer count as open, but are
    not made good.
    """

    incident: IncidentId
    note: Reason
    quiet_until: Ahead | None = Field(
        None, description="Until then, 7 days at most, the same error opens no other incident."
    )
    failed_until: Instant | None = Field(
        None,
        description="Acknowledge only the runs that had failed by then, "
        "such as the `last_at` of the incident.",
    )

    async def perform(self, context: Context) -> Acknowledged:
        from batch_system.operations.incidents import change

        return await change.acknowledge(
            context, self.incident, self.note, self.quiet_until, self.failed_until
        )


class ReopenIncident(
    Verb, role="operator", http=post("/incidents/{incident}/reopen"), audit="incident.reopen"
):
    """Undo an acknowledgement: the failed runs of the incident count as open again."""

    incident: IncidentId

    async def perform(self, context: Context) -> Incident:
        from batch_system.operations.incidents import change

        return await change.reopen(context, self.incident)


class ListMessages(Verb, role="operator", http=get("/alerts", tag="incidents")):
    """List the messages about incidents, the newest first, a page at a time: those that were sent,
    those that wait, and those that were given up.
    """

    state: Literal["waiting", "sent", "given_up"] | None = Field(
        None, description="Only messages in this state."
    )
    channel: Channel | None = Field(None, description="Only messages to this channel.")
    limit: int = Field(
        50, ge=1, le=MOST_INCIDENTS, description="How many messages the page has at most."
    )
    after: Cursor | None = None

    async def perform(self, context: Context) -> MessagePage:
        from batch_system.operations.incidents import read

        return await read.list_messages(context, self.state, self.channel, self.limit, self.after)


class SendTestMessage(
    Verb,
    role="admin",
    http=post("/alerts/test", tag="incidents", status=202),
    audit="alerts.test",
):
    """Write a test message to the channels of the settings, which the service sends."""

    channels: list[Channel] = Field(
        [], max_length=20, description="Only channels of these names. Default: all."
    )

    async def perform(self, context: Context) -> SentTest:
        from batch_system.operations.incidents import change

        return await change.send_test(context, self.channels)
