"""Tasks: lists and shows them, pauses, resumes, mutes and unmutes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from batch_system.operations.incidents.results import Muted, Unmuted
from batch_system.operations.tasks.keys import KeyPage
from batch_system.operations.tasks.results import (
    Paused,
    PauseOfTask,
    Resumed,
    ResumedAhead,
    Slots,
    TaskDetails,
    TaskList,
)
from batch_system.verbs.fields import Ahead, Note, PoolName, TaskName
from batch_system.verbs.verb import Verb, get, post

if TYPE_CHECKING:
    from batch_system.operations.asking.context import Context


class ListTasks(Verb, role="viewer", http=get("/tasks")):
    """List all tasks that a process of the service has loaded, by name."""

    pool: PoolName | None = Field(None, description="Only tasks of this pool.")

    async def perform(self, context: Context) -> TaskList:
        from batch_system.operations.tasks import listing

        tasks = await listing.list_tasks(context, with_others=True)
        of_pool = [task for task in tasks if task.error is None and task.pool == self.pool]
        return TaskList(tasks=list(tasks) if self.pool is None else of_pool)


class ShowTask(Verb, role="viewer", http=get("/tasks/{name}")):
    """Show a task: schedule, next slots, policies, parameters, newest runs and missed ranges."""

    name: TaskName

    async def perform(self, context: Context) -> TaskDetails:
        from batch_system.operations.tasks import details

        return await details.show(context, self.name)


class ShowSchedule(Verb, role="viewer", http=get("/tasks/{name}/schedule")):
    """Show the next slots of a task; none without a schedule and during a pause."""

    name: TaskName
    n: Annotated[int, Field(ge=1, le=1_000, description="How many slots.")] = 10

    async def perform(self, context: Context) -> Slots:
        from batch_system.operations.tasks import details

        return await details.slots_of(context, self.name, self.n)


class ListKeys(Verb, role="viewer", http=get("/tasks/{name}/keys")):
    """List the keys of a task with a limit: how many runs of each are running, and how many
    wait.
    """

    name: TaskName
    after: Annotated[
        str, Field(max_length=200, description="The queue after which the page begins.")
    ] = ""
    limit: Annotated[int, Field(ge=1, le=100, description="How many keys at most.")] = 100

    async def perform(self, context: Context) -> KeyPage:
        from batch_system.operations.tasks import keys

        return await keys.keys_of(context, self.name, self.after, self.limit)


class PauseTask(
    Verb,
    role="operator",
    http=post("/tasks/{name}/pause"),
    audit="task.pause",
):
    """Stop firing a task, until it is resumed, or for a while: then a running service resumes it.

    Active runs of the task stop at their next checkpoint, and continue after the pause. Slots
    during the pause are recorded as missed, and never caught up. If the task is paused already,
    only the end of its pause is changed, if one is given.
    """

    name: TaskName
    until: Ahead | None = Field(None, description="When the pause ends by itself. Default: never.")
    note: Note | None = None

    async def perform(self, context: Context) -> Paused:
        from batch_system.operations.tasks import pausing

        return await pausing.pause(context, self.name, self.note, self.until)


class ShowPause(Verb, role="viewer", http=get("/tasks/{name}/pause")):
    """Show the pause of a task, if it is paused."""

    name: TaskName

    async def perform(self, context: Context) -> PauseOfTask:
        from batch_system.operations.tasks import pausing

        return PauseOfTask(pause=await pausing.pause_of(context, self.name))


class ResumeTask(Verb, role="operator", http=post("/tasks/{name}/resume"), audit="task.resume"):
    """Fire a task again, from now on: one that is paused, or that does not fire because a clock was
    ahead.

    The runs that the pause has stopped continue. A clock that was ahead has fired slots before
    their time; those that have a run get no other one.
    """

    name: TaskName
    note: Note | None = None

    async def perform(self, context: Context) -> Resumed:
        from batch_system.operations.tasks import pausing

        return await pausing.resume(context, self.name, self.note)


class ResumeTasksAhead(Verb, role="operator", http=post("/tasks/resume"), audit="task.resume"):
    """Fire all tasks again that don't fire because a clock was ahead. Paused tasks stay paused."""

    note: Note | None = None

    async def perform(self, context: Context) -> ResumedAhead:
        from batch_system.operations.tasks import pausing

        return await pausing.resume_ahead(context, self.note)


class MuteTask(
    Verb,
    role="operator",
    http=post("/tasks/{name}/mute", tag="incidents"),
    audit="task.mute",
):
    """Send nothing about a task for a while: no mail, no message.

    Incidents are opened as ever, and stand on the page. What is still open at the end is sent then.
    """

    name: TaskName
    until: Ahead = Field(description="Until when nothing is sent, within the next 31 days.")
    note: Note | None = None

    async def perform(self, context: Context) -> Muted:
        from batch_system.operations.incidents import change

        return await change.mute(context, self.name, self.until, self.note)


class UnmuteTask(
    Verb,
    role="operator",
    http=post("/tasks/{name}/unmute", tag="incidents"),
    audit="task.unmute",
):
    """Send messages about a task again."""

    name: TaskName

    async def perform(self, context: Context) -> Unmuted:
        from batch_system.operations.incidents import change

        return await change.unmute(context, self.name)
