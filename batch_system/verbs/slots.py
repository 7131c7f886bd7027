"""Slots: the account of an interval, and missed slots that are left as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from batch_system.operations.slots.results import Accounts, LeftSlots
from batch_system.verbs.fields import Instant, Reason, Since, TaskName
from batch_system.verbs.verb import Verb, get, post

if TYPE_CHECKING:
    from batch_system.operations.asking.context import Context


class AccountForSlots(Verb, role="viewer", http=get("/account", tag="service")):
    """Say what became of every slot of an interval."""

    since: Since = Field(description="The beginning of the interval.")
    until: Since | None = Field(None, description="The end of the interval. Default: now.")
    task: TaskName | None = Field(None, description="Only slots of this task.")

    async def perform(self, context: Context) -> Accounts:
        from batch_system.operations.slots import account

        return await account.accounts(context, self.since, self.until, self.task)


class LeaveSlots(
    Verb, role="operator", http=post("/slots/leave", tag="service"), audit="slots.leave"
):
    """Say that nothing has to be done about the missed ranges that lie within an interval, both
    ends included, and why. Those of pauses are left out.
    """

    since: Instant
    until: Instant
    task: TaskName | None = Field(None, description="Default: all tasks.")
    note: Reason | None = Field(None, description="It is needed, unless `dry_run` is true.")
    slots: int | None = Field(
        None, ge=0, description="How many slots they are. It is refused if there are others."
    )
    dry_run: bool = Field(False, description="Change nothing. No note is needed then.")

    async def perform(self, context: Context) -> LeftSlots:
        from batch_system.operations.slots import leaving

        if self.dry_run:
            return await leaving.look(context, self.since, self.until, self.task)
        return await leaving.leave(
            context, self.since, self.until, self.note, self.task, self.slots
        )


class ReopenSlots(
    Verb, role="operator", http=post("/slots/reopen", tag="service"), audit="slots.reopen"
):
    """Take up again the missed ranges within an interval that somebody has left as they are."""

    since: Instant
    until: Instant
    task: TaskName | None = Field(None, description="Default: all tasks.")

    async def perform(self, context: Context) -> LeftSlots:
        from batch_system.operations.slots import leaving

        return await leaving.reopen(context, self.since, self.until, self.task)
