"""`batch tasks` and `batch next`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batch_system import clock
from batch_system.cli.asked import asks
from batch_system.cli.hints import hint_without_service, warn
from batch_system.cli.opening import ask
from batch_system.cli.options import AsJson, instant, whole
from batch_system.escaping import echoed
from batch_system.words import dates_in_words

if TYPE_CHECKING:
    from batch_system.batch.cron.cron import Schedule
    from batch_system.operations.tasks.results import Slots, TaskDetails, TaskSummary
    from batch_system.verbs.following import Operations
    from batch_system.verbs.tasks import ListKeys


def tasks(as_json: AsJson = False) -> None:
    """List the tasks, and the time at which each one fires next.

    Files that can't be used are listed on stderr, and the exit code is then 1. If the name of their
    task is known, the list has the task too, with the error.
    """
    from batch_system import console
    from batch_system.operations.tasks import listing
    from batch_system.verbs.tasks import ListTasks

    async def work(operations: Operations) -> tuple[Sequence[TaskSummary], str | None]:
        if operations.is_here:
            found = await listing.list_tasks(operations.context)
        else:
            found = (await operations(ListTasks())).tasks
        return found, None if as_json else await hint_without_service(operations)

    tasks, hint = ask(work)
    broken = [task for task in tasks if task.error]
    named = [task for task in tasks if task.name]
    if as_json:
        console.show_json(list(tasks))
    elif named:
        columns = [
            "name",
            "schedule",
            "timezone",
            "next_run_time",
            "paused",
            "pool",
            "memory",
            "source",
            "error",
        ]
        console.show([_row(task) for task in named], columns, as_json=False)
    elif not broken:
        console.warn("batch: there is no task in TASKS_DIR")
    for task in tasks:
        if task.served_from and Path(task.served_from).name != Path(task.source).name:
            reason = (
                f"running services use {task.served_from} for the task {task.name} until they are "
                "restarted"
            )
            console.warn(f"batch: {task.source} is not used yet: {reason}")
    for file in broken:
        console.warn(f"batch: {file.source} can't be used: {file.error}")
    warn(hint)
    raise SystemExit(1 if broken else 0)


@asks("asked", "batch_system.verbs.tasks:ListKeys", names={"name": "NAME"})
def keys(asked: ListKeys, as_json: AsJson = False) -> None:
    """List the keys of a task with a limit: how many runs of each are running, and how many
    wait.
    """
    from batch_system import console

    found = ask(lambda operations: operations(asked))
    if as_json:
        console.show_json(found)
        return
    rows = [{**each.model_dump(), "since": each.oldest} for each in found.keys]
    console.show(rows, ["key", "running", "limit", "waiting", "since", "failing"], as_json=False)
    if found.after is not None:
        console.warn(f"batch: there are more keys: --after {found.after!r}")


def _row(task: TaskSummary) -> dict[str, object]:
    """The cells of a task. The default pool is not named."""
    from batch_system.operations.tasks.results import memory_in_words
    from batch_system.settings.pools import DEFAULT_POOL

    pool = task.pool if task.pool != DEFAULT_POOL else None
    return {**task.model_dump(), "pool": pool, "memory": memory_in_words(task.memory)}


def next_(
    expression: Annotated[
        str, typer.Argument(help="A cron expression in quotes, or the name of a task.")
    ],
    tz: Annotated[str, typer.Option(help="The time zone of the expression.")] = "UTC",
    after: Annotated[
        str | None, typer.Option(help="Show the times after this instant (ISO 8601); default: now.")
    ] = None,
    n: Annotated[
        int,
        typer.Option(
            "-n", parser=whole(1, 10_000), metavar="NUMBER", help="The number of times to show."
        ),
    ] = 5,
    task: Annotated[
        str | None, typer.Option(help="The task whose name decides what H in the expression is.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the times at which a cron expression or a task fires.

    The expression has five fields, as in cron: minute, hour, day of month, month, day of week. With
    six fields, the first one is the second. Names such as @daily and @weekly are allowed too.
    """
    from batch_system import console
    from batch_system.batch.tasks.declaration import NAME

    if NAME.fullmatch(expression):
        if after is not None or tz != "UTC" or task is not None:
            raise typer.BadParameter("--after, --tz and --task are for expressions")
        _next_of_task(expression, n, as_json)
        return
    schedule = _schedule_of(expression, tz, task)
    at = instant(after, "--after", schedule.zone) if after is not None else clock.now()
    rows = [
        {"slot": slot, "local": slot.astimezone(schedule.zone)}
        for slot in schedule.following(at, n)
    ]
    if not as_json:
        console.say(schedule.words)
        if schedule.given:
            console.say(schedule.written)
    console.show(rows, ["slot", "local"], as_json)


def _schedule_of(expression: str, tz: str, task: str | None) -> Schedule:
    from batch_system.batch.cron.spread import has_spread
    from batch_system.batch.tasks.task_schedule import schedule_for
    from batch_system.errors import InvalidSchedule

    if task is None and has_spread(expression):
        raise InvalidSchedule(
            f"what H is in {echoed(expression)} depends on the name of the task: add --task NAME"
        )
    return schedule_for(expression, tz, lambda: task or "")


def _next_of_task(name: str, number: int, as_json: bool) -> None:
    from batch_system import console
    from batch_system.verbs.tasks import ShowSchedule, ShowTask

    async def work(operations: Operations) -> tuple[TaskDetails, Slots]:
        task = await operations(ShowTask(name=name))
        return task, await operations(ShowSchedule(name=name, n=min(number, 1_000)))

    task, found = ask(work)
    if not as_json:
        console.say(task.words or "No schedule: it is started by hand")
        if task.given:
            console.say(f"{task.given}, which became {task.schedule}")
    console.show([slot.model_dump() for slot in found.slots], ["slot", "local"], as_json)
    if found.left_out and not as_json:
        console.say(f"left out: {dates_in_words(found.left_out)}")
