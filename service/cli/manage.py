"""Commands that change what the services do: they write to the ledger, and running services follow it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.opening import ask
from service.cli.options import OneRun, TaskName, instant, seconds, utc

if TYPE_CHECKING:
    from service.operations.backfill import BackfillCounts, BackfillSlot
    from service.operations.operations import Operations
    from service.operations.results import RunNow

Anew = Annotated[bool, typer.Option("--again", help="From the beginning, also where it has succeeded.")]


def pause(name: TaskName) -> None:
    """Stop firing a task, until `batch resume`.

    Its runs stop at their next checkpoint, and go on after the pause. The slots of the pause are recorded as missed,
    and never caught up.
    """
    from service import console

    paused = ask(lambda operations: operations.tasks.pause(name))
    if paused.is_new:
        console.say(f"{name} is paused by {paused.by}")
    else:
        console.say(f"{name} was paused already, at {utc(paused.at)} by {paused.by}")


def resume(name: TaskName) -> None:
    """Fire a paused task again, from now on. What the pause held goes on."""
    from service import console

    ended = ask(lambda operations: operations.tasks.resume(name))
    if ended is None:
        console.say(f"{name} is not paused")
    else:
        console.say(f"{name} fires again; it was paused at {utc(ended.at)} by {ended.by}")


def cancel(
    run: OneRun,
    wait: Annotated[
        float, typer.Option(parser=seconds, metavar="SECONDS", help="Wait so many seconds for its end.")
    ] = 10.0,
) -> None:
    """Cancel a run, wherever it is.

    One that waits is cancelled at once. One that runs is asked to stop within two seconds: an async run gets a
    CancelledError, a sync one sees it in current_run().cancelled, or stops at its next checkpoint(). The exit code is 1
    when it ended otherwise, or has not ended yet.
    """
    from service import console

    cancelled = ask(lambda operations: operations.runs.cancel(run, wait))
    reason = f": {cancelled.reason}" if cancelled.reason else ""
    state = f"{cancelled.state}{reason}" if cancelled.finished_at else "is still running; it is asked to stop"
    console.say(f"run {cancelled.id} {state}")
    raise SystemExit(0 if cancelled.state == "cancelled" else 1)


def retry(run: OneRun, again: Anew = False) -> None:
    """Give a run that has failed, or was cancelled or skipped, a new attempt.

    It goes on after its last checkpoint, in a running service. With --again it begins anew.
    """
    from service import console

    async def work(operations: Operations) -> tuple[RunNow, str | None]:
        retried = await operations.runs.retry(run, from_the_beginning=again)
        return retried, await hint_if_held(operations, retried.task)

    retried, hint = ask(work)
    console.say(f"run {retried.id} of {retried.task} is {retried.state} again")
    warn(hint)


def backfill(
    name: TaskName,
    from_: Annotated[str, typer.Option("--from", help="The first instant (ISO 8601).")],
    to: Annotated[str, typer.Option("--to", help="The last instant; slots to come are left out.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the slots, change nothing.")] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Also where a slot's run is over: from the beginning.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Also more than 10,000 slots.")] = False,
) -> None:
    """Make runs for slots of the past that have none.

    The slots are those of the schedule that the task has now, both ends included. Their runs wait behind what is on
    time. A slot that has a run is left alone, however that ended; with --again, a run that is over gets a new attempt.
    """
    from service import console
    from service.operations.backfill import BackfillRequest

    def see(slot: BackfillSlot) -> None:
        if dry_run:
            run = f"run {slot.run} {slot.state}" if slot.run else "no run"
            console.say(f"{utc(slot.slot)}  {slot.action:<5}  {run}")

    async def work(operations: Operations) -> tuple[BackfillCounts, str | None]:
        counts = await operations.slots.backfill(request, see)
        changes = not dry_run and counts.new + counts.again
        return counts, await hint_if_unserved(operations, name) if changes else None

    request = BackfillRequest(name, instant(from_, "--from"), instant(to, "--to"), again, yes, dry_run)
    counts, hint = ask(work)
    made = "would be made" if dry_run else "made"
    console.say(
        f"{counts.slots:,} slots of {name}: {counts.new:,} runs {made}, "
        f"{counts.again:,} again, {counts.left:,} left as they are"
    )
    warn(hint)


def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, change nothing.")] = False,
) -> None:
    """Delete runs that ended more than KEEP_RUNS_DAYS ago, with their attempts and logs.

    The newest KEEP_RUNS_PER_TASK of each task stay in any case. A service does this every hour by itself.
    """
    from service import console
    from service.config import get_settings

    if not dry_run:
        pruned = ask(lambda operations: operations.runs.prune())
        console.say("pruned " + (", ".join(f"{count:,} {what}" for what, count in pruned.items()) or "nothing"))
        return
    prunable = ask(lambda operations: operations.runs.count_prunable())
    for task, count in sorted(prunable.items()):
        console.say(f"{task}: {count:,} runs would go")
    days = get_settings().KEEP_RUNS_DAYS
    console.say(f"{sum(prunable.values()):,} runs ended more than {days} days ago and would go")


async def hint_if_held(operations: Operations, task: str) -> str | None:
    """The reason why a run does not continue: its task is paused, or no service has the task."""
    if (pause := await operations.tasks.pause_of(task)) is not None:
        return f"{task} is paused by {pause.by}: `batch resume {task}` lets it go on"
    return await hint_if_unserved(operations, task)


async def hint_if_unserved(operations: Operations, task: str) -> str | None:
    """A hint for a user who waits for a run, if no live node has the task."""
    if await operations.nodes.has(task):
        return None
    return f"no service that has {task} is running: the next one runs it"


def warn(hint: str | None) -> None:
    from service import console

    if hint is not None:
        console.warn(f"batch: {hint}")
