"""Commands that change what services do. They write to the ledger, and running services react to
that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from batch_system.cli.hints import hint_if_unserved, warn
from batch_system.cli.opening import ask
from batch_system.cli.options import AsJson, TaskName, instant
from batch_system.words import utc

if TYPE_CHECKING:
    from batch_system.operations.starting.results import (
        BackfillCounts,
        BackfillRequest,
        BackfillSlot,
    )
    from batch_system.verbs.following import Operations


def backfill(
    name: TaskName,
    from_: Annotated[str, typer.Option("--from", help="The beginning of the interval (ISO 8601).")],
    to: Annotated[
        str, typer.Option("--to", help="The end of the interval. Future slots are left out.")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the slots, and change nothing.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Also give a new attempt to runs that are over.")
    ] = False,
    and_after: Annotated[
        bool,
        typer.Option(
            "--and-after", help="Do the same with the slots of the tasks that come after."
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Allow more than 10,000 slots.")] = False,
    as_json: AsJson = False,
) -> None:
    """Create runs for past slots that have none.

    A slot is an instant at which the task is due. The slots are those of the present schedule of
    the task, and both ends of the interval are included. The new runs wait behind runs that are on
    time or were started by hand.

    A slot that has a run in any state gets no other run. With --again, a run that is over gets a
    new attempt, which begins from the beginning. With --and-after, the same is done with the slots
    of the tasks that wait for these slots, in whichever depth: their runs wait until what they come
    after has succeeded.
    """
    from batch_system import console
    from batch_system.operations.starting import backfill
    from batch_system.operations.starting.results import BackfillRequest

    def print_slot(slot: BackfillSlot) -> None:
        if dry_run and as_json:
            slots.append(slot)
        elif dry_run:
            run = f"run {slot.run} {slot.state}" if slot.run else "no run"
            console.say(f"{utc(slot.slot)}  {slot.action:<5}  {run}")

    async def work(operations: Operations) -> tuple[BackfillCounts, str | None]:
        if operations.is_here:
            counts = await backfill.run(operations.context, request, print_slot)
        else:
            counts = await _asked_for(operations, request)
        changes = not dry_run and counts.changed
        return counts, await hint_if_unserved(operations, name) if changes else None

    slots: list[BackfillSlot] = []
    request = BackfillRequest(
        name, instant(from_, "--from"), instant(to, "--to"), again, yes, dry_run, and_after
    )
    counts, hint = ask(work)
    if as_json:
        console.show_json({"counts": counts, "slots": slots} if dry_run else counts)
        warn(hint)
        return
    get = "would get" if dry_run else "got"
    unchanged = "would not change" if dry_run else "did not change"
    console.say(
        f"{_number(counts.slots, 'slot')} of {name}: {counts.new:,} {get} a new run, "
        f"{counts.again:,} {get} a new attempt, {counts.left:,} {unchanged}"
    )
    if counts.left_out:
        console.say(f"  left out: {', '.join(counts.left_out)}")
    if counts.pruned:
        console.warn(
            f"{counts.pruned:,} of the new runs would be skipped at once: there are no runs any "
            "more of the slots that they wait for; backfill those first"
        )
    for task, after in counts.after.items():
        console.say(
            f"  after it, {_number(after.slots, 'slot')} of {task}: {after.new:,} {get} a new run, "
            f"{after.again:,} {get} a new attempt, {after.left:,} {unchanged}"
        )
    warn(hint)


async def _asked_for(operations: Operations, request: BackfillRequest) -> BackfillCounts:
    """Let a service make the runs. It lists no slots."""
    from batch_system.verbs.bulks import BeginBackfill, PreviewBackfill
    from batch_system.verbs.following import carried_out

    preview = await operations(
        PreviewBackfill(
            name=request.task,
            since=request.since,
            until=request.until,
            redo=request.redo,
            many=request.allow_many,
            and_after=request.and_after,
        )
    )
    assert preview.counts is not None
    if not request.dry_run:
        begun = await operations(BeginBackfill(name=request.task, preview=preview.id))
        await carried_out(operations, begun, lambda _: None)
    return preview.counts


def prune(
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show how many runs would be deleted, and delete nothing."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete runs that ended more than KEEP_RUNS_DAYS ago, with their attempts and logs.

    The newest KEEP_RUNS_PER_TASK runs of each task are always kept. A running service does the same
    every hour.
    """
    from batch_system import console
    from batch_system.operations.runs import change
    from batch_system.settings.reading import get_settings

    if not dry_run:
        deleted = ask(lambda operations: change.prune(operations.context))
        if as_json:
            console.show_json(dict(deleted))
            return
        console.say(
            "deleted "
            + (", ".join(f"{count:,} {kind}" for kind, count in deleted.items()) or "nothing")
        )
        return
    prunable = ask(lambda operations: change.count_prunable(operations.context))
    if as_json:
        console.show_json(dict(prunable))
        return
    for task, count in sorted(prunable.items()):
        console.say(f"{task}: {_number(count, 'run')} would be deleted")
    days, total = get_settings().KEEP_RUNS_DAYS, sum(prunable.values())
    console.say(
        f"{_number(total, 'run')} that ended more than {_number(days, 'day')} ago would be deleted"
    )


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
