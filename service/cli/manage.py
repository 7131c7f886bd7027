"""Commands that change what the services do: they write the ledger, and whoever runs follows it."""

from __future__ import annotations

from typing import Annotated

import typer

from service.cli.options import OneRun, TaskName, instant, seconds, user, utc, wait_for

Anew = Annotated[bool, typer.Option("--again", help="From the beginning, also where it has succeeded.")]


def pause(name: TaskName) -> None:
    """Stop firing a task, until `batch resume`.

    Its runs stop at their next checkpoint, and go on after the pause. The slots of the pause are recorded as missed,
    and never caught up.
    """
    from service import console
    from service.config import get_settings
    from service.operations import managing

    by = user()
    before = wait_for(managing.pause(get_settings(), name, by))
    if before is None:
        console.say(f"{name} is paused by {by}")
    else:
        console.say(f"{name} was paused already, at {utc(before.at)} by {before.by}")


def resume(name: TaskName) -> None:
    """Fire a paused task again, from now on. What the pause held goes on."""
    from service import console
    from service.config import get_settings
    from service.operations import managing

    ended = wait_for(managing.resume(get_settings(), name))
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
    from service.config import get_settings
    from service.operations import managing

    row = wait_for(managing.cancel_run(get_settings(), run, user(), wait))
    reason = f": {row['reason']}" if row["reason"] else ""
    told = f"{row['state']}{reason}" if row["finished_at"] else "is still running; it is asked to stop"
    console.say(f"run {row['id']} {told}")
    raise SystemExit(0 if row["state"] == "cancelled" else 1)


def retry(run: OneRun, again: Anew = False) -> None:
    """Give a run that has failed, or was cancelled or skipped, a new attempt.

    It goes on after its last checkpoint, in a running service. With --again it begins anew.
    """
    from service import console
    from service.config import get_settings
    from service.operations import managing

    settings = get_settings()
    row = wait_for(managing.retry(settings, run, user(), again))
    console.say(f"run {row['id']} of {row['task']} is {row['state']} again")
    warn_if_held(row["task"])


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
    from service.batch.firing.backfill import Entry, Fate
    from service.config import get_settings
    from service.operations import managing

    def see(entry: Entry) -> None:
        if dry_run:
            what = f"run {entry.run} {entry.state}" if entry.run else "no run"
            console.say(f"{utc(entry.slot)}  {entry.fate:<5}  {what}")

    wanted = managing.Wanted(name, instant(from_, "--from"), instant(to, "--to"), again, yes, dry_run)
    counts = wait_for(managing.fill(get_settings(), wanted, user(), see))
    made = "would be made" if dry_run else "made"
    console.say(
        f"{sum(counts.values()):,} slots of {name}: {counts[Fate.NEW]:,} runs {made}, "
        f"{counts[Fate.AGAIN]:,} again, {counts[Fate.LEFT]:,} left as they are"
    )
    if not dry_run and counts[Fate.NEW] + counts[Fate.AGAIN]:
        warn_if_unserved(name)


def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, change nothing.")] = False,
) -> None:
    """Delete runs that ended more than KEEP_RUNS_DAYS ago, with their attempts and logs.

    The newest KEEP_RUNS_PER_TASK of each task stay in any case. A service does this every hour by itself.
    """
    from service import console
    from service.config import get_settings
    from service.operations import managing

    settings = get_settings()
    counts = wait_for(managing.prune(settings, dry_run))
    if dry_run:
        for task, count in sorted(counts.items()):
            console.say(f"{task}: {count:,} runs would go")
        console.say(f"{sum(counts.values()):,} runs ended more than {settings.KEEP_RUNS_DAYS} days ago and would go")
    else:
        console.say("pruned " + (", ".join(f"{count:,} {what}" for what, count in counts.items()) or "nothing"))


def warn_if_held(task: str) -> None:
    """A run that there was before has to wait for the end of a pause."""
    from service import console
    from service.config import get_settings
    from service.operations import managing

    if (pause := wait_for(managing.pause_of(get_settings(), task))) is not None:
        console.warn(f"batch: {task} is paused by {pause.by}: `batch resume {task}` lets it go on")
    else:
        warn_if_unserved(task)


def warn_if_unserved(task: str) -> None:
    """Who waits for something that nobody does should know."""
    from service import console
    from service.config import get_settings
    from service.operations import managing

    if not wait_for(managing.is_served(get_settings(), task)):
        console.warn(f"batch: no service that has {task} is running: the next one runs it")
