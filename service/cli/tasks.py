"""Commands about tasks and their schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service import clock
from service.cli.opening import ask
from service.cli.options import AsJson, instant, whole


def tasks(as_json: AsJson = False) -> None:
    """List the tasks, and when each fires next.

    The exit code is 1 when there are files that can't be used; they are named on stderr.
    """
    from service import console

    listed = ask(lambda operations: operations.tasks.list())
    broken = [task for task in listed if task.error]
    shown = ["name", "schedule", "timezone", "next_run_time", "paused", "source"]
    console.show([task.model_dump() for task in listed if as_json or not task.error], shown, as_json)
    for task in listed:
        if task.served_from and Path(task.served_from).name != Path(task.source).name:
            served = f"the services have {task.name} from {task.served_from} until they are restarted"
            console.warn(f"batch: {task.source} is not used yet: {served}")
    for file in broken:
        console.warn(f"batch: {file.source} can't be used: {file.error}")
    raise SystemExit(1 if broken else 0)


def next_(
    expression: Annotated[str, typer.Argument(help="A cron expression, quoted.")],
    tz: Annotated[str, typer.Option(help="The time zone that it is read in.")] = "UTC",
    after: Annotated[str | None, typer.Option(help="Slots after this instant (ISO 8601); default: now.")] = None,
    n: Annotated[int, typer.Option("-n", parser=whole(1, 10_000), metavar="NUMBER", help="How many.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Show when a cron expression fires.

    Five fields as in cron (minute, hour, day-of-month, month, day-of-week); six with the second first; or @daily and
    its friends.
    """
    from service import console
    from service.batch.cron.cron import schedule as schedule_of

    schedule = schedule_of(expression, tz)
    at = instant(after, "--after", schedule.zone) if after is not None else clock.now()
    found = [{"slot": slot, "local": slot.astimezone(schedule.zone)} for slot in schedule.following(at, n)]
    if not as_json:
        console.say(schedule.words)
    console.show(found, ["slot", "local"], as_json)
