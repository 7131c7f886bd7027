"""`batch cancel`, `retry` and `undo`: of one run, or of all runs that match a filter."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated

import typer

from batch_system.cli.asked import asks
from batch_system.cli.confirming import confirm
from batch_system.cli.filters import FILTER, refuse_slow
from batch_system.cli.hints import hint_if_held, hint_without_service, warn
from batch_system.cli.opening import ask
from batch_system.cli.options import AsJson, Note, RunOrNone, seconds
from batch_system.errors import InvalidParameters
from batch_system.words import short, utc

if TYPE_CHECKING:
    from batch_system.operations.asking.filter import RunFilter
    from batch_system.operations.asking.results import RunNow
    from batch_system.operations.bulks.results import Bulk, BulkAction, Preview, PreviewedRun
    from batch_system.verbs.following import Operations

Again = Annotated[
    bool,
    typer.Option("--again", help="Begin from the beginning. Allowed also if the run succeeded."),
]
AndAfter = Annotated[
    bool,
    typer.Option(
        "--and-after", help="With --again: also run again what has waited for the run, after it."
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Change all runs that match, without asking.")]
OfIncident = Annotated[
    str | None,
    typer.Option(
        metavar="INCIDENT",
        help="The failed runs of this incident, and of other tasks with its error.",
    ),
]
_DONE = {
    "retry": "queued again",
    "cancel": "cancelled, or asked to stop",
    "acknowledge": "acknowledged",
    "reopen": "open again",
}


@asks(
    "wanted",
    "batch_system.operations.asking.filter:RunFilter",
    names=FILTER,
    without=("run",),
)
def cancel(
    wanted: RunFilter,
    run: RunOrNone = None,
    wait: Annotated[
        float,
        typer.Option(
            parser=seconds,
            metavar="SECONDS",
            help="The number of seconds to wait for the end of the run.",
        ),
    ] = 10.0,
    note: Note = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Cancel a run in any process, on any machine, or all active runs that match a filter.

    A waiting run is cancelled at once. A running one gets the request to stop within two seconds:
    an async run gets a CancelledError; a sync run can read current_run().cancelled, and stops at
    its next checkpoint(). The exit code is 1 if the run has ended in another state, or has not
    ended yet.

    Without RUN, the options say which runs are cancelled. The command shows their number, and asks.
    """
    from batch_system import console

    refuse_slow(wanted)
    if run is None:
        _refuse_none(wanted)
        change_all("cancel", wanted, yes, as_json, note)
        return
    _refuse_both(wanted)
    cancelled = ask(lambda operations: _cancelled(operations, run, wait, note))
    if as_json:
        console.show_json(cancelled)
    else:
        reason = f": {cancelled.reason}" if cancelled.reason else ""
        state_now = (
            f"{cancelled.state}{reason}"
            if cancelled.finished_at
            else "is still running, and is asked to stop"
        )
        console.say(f"run {cancelled.id} {state_now}")
    raise SystemExit(0 if cancelled.state == "cancelled" else 1)


async def _cancelled(operations: Operations, run: str, seconds: float, note: str | None) -> RunNow:
    """Cancel a run, and wait at most the given number of seconds for its end."""
    from batch_system.verbs.following import ended_within
    from batch_system.verbs.run_changes import CancelRun

    cancelled = await operations(CancelRun(run=run, note=note))
    return await ended_within(operations, cancelled, seconds)


@asks(
    "wanted",
    "batch_system.operations.asking.filter:RunFilter",
    names=FILTER,
    without=("run",),
)
def retry(
    wanted: RunFilter,
    run: RunOrNone = None,
    again: Again = False,
    and_after: AndAfter = False,
    error: OfIncident = None,
    note: Note = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Give a new attempt to a run that has failed, or was cancelled or skipped, or to all that
    match a filter.

    A running service executes it. The run continues after its last checkpoint; with --again, from
    the beginning. With --and-after, the runs that have waited for it are run again too, in
    whichever depth: the command shows how many, and asks. They wait until it has succeeded.

    Without RUN, the options say which runs get a new attempt, or --error names an incident: then it
    is the failed runs of that, and of the other tasks that have failed together with the same
    error. The command shows their number, and asks.
    """
    refuse_slow(wanted)
    if error is not None:
        if run is not None or again or and_after or not wanted.is_empty:
            raise InvalidParameters("--error selects the runs: leave out RUN and the other options")
        _change(lambda operations: _of_error(operations, error), yes, as_json, note)
    elif run is not None:
        _refuse_both(wanted)
        _retry_one(run, again, and_after, yes, as_json, note)
    elif again or and_after:
        raise InvalidParameters(
            "--again needs RUN: runs are begun from the beginning one at a time"
        )
    else:
        _refuse_none(wanted)
        change_all("retry", wanted, yes, as_json, note)


def undo(
    bulk: Annotated[
        str, typer.Argument(metavar="BULK", help="The id of the bulk, as `batch changes` shows it.")
    ],
    note: Note = None,
    yes: Annotated[bool, typer.Option("--yes", help="Undo it without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """Undo a change of many runs: cancel what it has retried, retry what it has cancelled, and let
    count as open again what it has acknowledged.

    Only those of its runs are changed that are still as it has left them: a retried run that has
    ended stays as it is. The command shows their number, and asks.
    """
    from batch_system.verbs.bulks import UndoBulk

    _change(lambda operations: operations(UndoBulk(preview=bulk)), yes, as_json, note)


def _retry_one(
    run: str, again: bool, and_after: bool, yes: bool, as_json: bool, note: str | None
) -> None:
    from batch_system import console
    from batch_system.verbs.run_changes import RetryRun

    if and_after and again and not yes:
        _confirm_after(run, as_json)

    async def work(operations: Operations) -> tuple[RunNow, str | None]:
        retried = await operations(
            RetryRun(run=run, from_the_beginning=again, and_after=and_after, note=note)
        )
        return retried, await hint_if_held(operations, retried.task)

    retried, hint = ask(work)
    if as_json:
        console.show_json(retried)
    else:
        console.say(f"run {retried.id} of {retried.task} is {retried.state} again")
    warn(hint)


def _confirm_after(run: str, as_json: bool) -> None:
    """Show how many runs of which tasks are run again after it, and ask."""
    from batch_system import console
    from batch_system.verbs.runs import CountRunsAfter

    after = ask(lambda operations: operations(CountRunsAfter(run=run)))
    if not after.tasks:
        return
    numbers = ", ".join(f"{_number(count)} of {task}" for task, count in after.tasks.items())
    if not as_json:
        console.say(f"run {after.run} is run again, and after it {numbers}")
    confirm(f"Run again {_number(1 + sum(after.tasks.values()))}?", "nothing was changed")


def _refuse_both(wanted: RunFilter) -> None:
    if not wanted.is_empty:
        raise InvalidParameters("RUN names one run: leave out the options that select runs, or RUN")


def _refuse_none(wanted: RunFilter) -> None:
    if wanted.is_empty:
        options = "--task, --tag, --pool, --state, --origin, --since or --ended-since"
        raise InvalidParameters(f"name a RUN, or select runs by an option: {options}")


def change_all(
    action: BulkAction, wanted: RunFilter, yes: bool, as_json: bool, note: str | None = None
) -> None:
    """Show what would be changed in the runs that match, ask, and change it."""
    from batch_system.verbs.bulks import PreviewBulk

    _change(
        lambda operations: operations(PreviewBulk(action=action, filter=wanted)), yes, as_json, note
    )


async def _of_error(operations: Operations, incident: str) -> Preview:
    from batch_system.operations.bulks import retrying

    return (await retrying.plan_retry(operations.context, incident, with_same_error=True)).preview


def _change(
    plan: Callable[[Operations], Awaitable[Preview]],
    yes: bool,
    as_json: bool,
    note: str | None = None,
) -> None:
    from batch_system import console
    from batch_system.verbs.bulks import BeginBulk
    from batch_system.verbs.following import carried_out

    preview = ask(plan)
    action = preview.action
    if not preview.count:
        _print_none(preview, as_json)
        return
    if not as_json:
        _print_preview(preview)
    if not yes:
        confirm(f"{action.capitalize()} {_number(preview.count)}?", "nothing was changed")

    async def work(operations: Operations) -> tuple[Bulk, str | None]:
        begun = await operations(BeginBulk(preview=preview.id, note=note))
        bulk = await carried_out(operations, begun, _reporter())
        return bulk, await hint_without_service(operations) if action == "retry" else None

    bulk, hint = ask(work)
    if as_json:
        console.show_json(bulk)
    else:
        others = bulk.count - bulk.changed
        unchanged = f"; {_number(others)} had another state by then" if others else ""
        console.say(
            f"{_number(bulk.changed)} {'is' if bulk.changed == 1 else 'are'} "
            f"{_DONE[action]}{unchanged}"
        )
    warn(hint)


def _print_none(preview: Preview, as_json: bool) -> None:
    from batch_system import console

    if as_json:
        console.show_json(preview)
    else:
        console.warn("batch: no runs match")


def _print_preview(preview: Preview) -> None:
    from batch_system import console

    console.say(f"{preview.action} {_number(preview.count)}:")
    if len(preview.tasks) > 1:
        named = ", ".join(f"{number:,} of {task}" for task, number in preview.tasks.items())
        rest = preview.count - sum(preview.tasks.values())
        others = f", and {rest:,} of other tasks" if rest else ""
        console.say(f"  {named}{others}")
    if preview.first is not None and preview.last is not None:
        console.say(f"  the newest  {_named(preview.first)}")
        console.say(f"  the oldest  {_named(preview.last)}")


def _named(run: PreviewedRun) -> str:
    return f"{short(run.id)} {run.task} {run.state}, created {utc(run.created_at)}"


def _reporter() -> Callable[[Bulk], None]:
    """A function that prints how far a bulk is, at most every LINE_SECONDS."""
    from batch_system import clock, console
    from batch_system.cli.bar import LINE_SECONDS

    printed_at = clock.monotonic()

    def report(bulk: Bulk) -> None:
        nonlocal printed_at
        if bulk.finished_at is None and clock.monotonic() >= printed_at + LINE_SECONDS:
            printed_at = clock.monotonic()
            console.warn(f"batch: {bulk.position:,} of {_number(bulk.count)}")

    return report


def _number(count: int) -> str:
    return f"{count:,} {'run' if count == 1 else 'runs'}"
