"""What is answered about incidents: an incident, a page of them, and what was done about them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from batch_system.batch.ledger.states import IncidentKind
from batch_system.operations.asking.results import KeptBack, Result

MOST_INCIDENTS = 200


class Incident(Result):
    """Something that needs a person, or needed one. `subject`: a node, a file or a place, where it
    is about one.

    `count`: its failures, slots or rows so far, also those that are over. `open`: of an open
    incident of runs, how many of them are neither made good nor acknowledged, which is the number
    that Night and the status say. `run`: the newest run that it is about. `told_at`: when a message
    about it was written last. `closed_why`: made_good, acknowledged, or over. `quiet_until`: until
    then the same error opens no other incident. `error`: open incidents of other tasks with the
    same one are one problem, if they began together.
    """

    id: str
    kind: IncidentKind
    task: str | None
    subject: str | None
    fingerprint: str | None
    text: str
    opened_at: datetime
    last_at: datetime
    count: int
    open: int | None = None
    run: str | None
    told_at: datetime | None
    closed_at: datetime | None
    closed_why: str | None
    acknowledged_at: datetime | None
    acknowledged_by: str | None
    note: str | None
    quiet_until: datetime | None
    error: str | None = None

    @property
    def of_problem(self) -> tuple[str | None, datetime]:
        """What the incidents of one problem have in common, and when the problem was opened."""
        return (self.error if self.closed_at is None else None), self.opened_at


class IncidentDetails(Incident):
    """An incident, and the runs that wait for a success of its failed runs (`keeps_back`)."""

    keeps_back: Sequence[KeptBack] = ()


class IncidentPage(Result):
    """A page of incidents, the newest first. `after`: the cursor of the next page; None at the
    end.
    """

    incidents: list[Incident]
    after: str | None


class Acknowledged(Result):
    """An acknowledgement. `runs`: how many failed runs it is about.

    `still_open`: how many runs have failed after the given instant. If there are any, the incident
    stays open.
    """

    incident: Incident
    runs: int
    still_open: int


class Muted(Result):
    """A task about which nothing is sent until an instant (UTC)."""

    task: str
    until: datetime
    by: str
    note: str | None


class Message(Result):
    """A message to one channel. `kind`: opened, repeated, closed, digest, test, … `state`: waiting,
    sent or given_up.

    `due_at`: when it is sent, or tried again. `attempts`: how often that was tried. `error`: why
    the last try failed, or why it was given up.
    """

    id: str
    channel: str
    kind: str
    state: Literal["waiting", "sent", "given_up"]
    incident: str | None
    created_at: datetime
    due_at: datetime
    attempts: int
    sent_at: datetime | None
    given_up_at: datetime | None
    error: str | None


class MessagePage(Result):
    """A page of messages, the newest first. `after`: the cursor of the next page; None at the
    end.
    """

    messages: list[Message]
    after: str | None


class SentTest(Result):
    """The channels to which a test message was written; the service sends it."""

    channels: list[str]


class Unmuted(Result):
    """Whether the task was muted."""

    was_muted: bool
