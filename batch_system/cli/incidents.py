"""`batch incidents`, `batch ack` and `batch alerts …`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batch_system import clock
from batch_system.cli import bulk
from batch_system.cli.asked import asks
from batch_system.cli.bulk import Yes
from batch_system.cli.filters import FILTER, refuse_slow
from batch_system.cli.opening import ask, pages
from batch_system.cli.options import AsJson, Limit, age
from batch_system.errors import InvalidParameters
from batch_system.words import short

if TYPE_CHECKING:
    from batch_system.operations.asking.filter import RunFilter
    from batch_system.operations.incidents.results import Acknowledged, Incident, Message
    from batch_system.verbs.following import Operations
    from batch_system.verbs.incidents import ListIncidents, ListMessages, SendTestMessage

COLUMNS = [
    "opened_at",
    "kind",
    "task",
    "count",
    "open",
    "text",
    "acknowledged_by",
    "closed_at",
    "id",
]

IncidentId = Annotated[
    str | None,
    typer.Argument(help="The id of the incident, or its last digits, as `batch incidents` shows."),
]


@asks("asked", "batch_system.verbs.incidents:ListIncidents", without=("limit", "after"))
def incidents(asked: ListIncidents, limit: Limit = 50, as_json: AsJson = False) -> None:
    """Show what needs a person, the newest first.

    An incident lasts from its first failure, or whatever else it is about, until that is made good
    or acknowledged.
    """
    from batch_system import console
    from batch_system.batch.incidents import problem as one_error

    found = ask(lambda operations: pages(operations, asked, limit), needs_tasks=False)
    listed: list[Incident] = [incident for page in found for incident in page.incidents]
    if len(listed) == limit:
        console.warn(
            f"batch: these are the newest {limit:,}; there may be more: --limit shows them"
        )
    if as_json:
        console.show_json(listed)
    elif listed:
        rows = [_row(problem) for problem in one_error.groups(listed, lambda each: each.of_problem)]
        console.show_fitted(rows, _columns(listed), ["text", "task"])
    else:
        console.warn(
            "batch: no incident is open" if asked.state == "open" else "batch: no incidents match"
        )


@asks(
    "wanted",
    "batch_system.operations.asking.filter:RunFilter",
    names=FILTER,
    without=("run", "state", "not_state", "origin", "parent", "node"),
)
def ack(
    wanted: RunFilter,
    incident: IncidentId = None,
    *,
    note: Annotated[
        str,
        typer.Option(
            help="What you do about it, or why nothing has to be done; 3 to 500 characters."
        ),
    ],
    quiet: Annotated[
        str | None,
        typer.Option(
            metavar="AGE",
            help="For how long the same error opens no other incident, such as 2h; at most 7d.",
        ),
    ] = None,
    run: Annotated[str | None, typer.Option(help="Acknowledge this failed run only.")] = None,
    error: bulk.OfIncident = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Acknowledge an incident, or failed runs: a person takes care of it.

    Failed runs that are acknowledged no longer count as open, but are not made good. If the error
    comes again, another incident is opened, unless --quiet says otherwise.

    Without INCIDENT, the options say which failed runs are acknowledged. The command shows their
    number, and asks. --error names an incident: it is acknowledged with those of other tasks that
    have failed together with its error.
    """
    refuse_slow(wanted)
    if sum((incident is not None, run is not None, error is not None, not wanted.is_empty)) > 1:
        raise InvalidParameters(
            "give INCIDENT, or --run, or --error, or options that select failed runs"
        )
    if quiet is not None and incident is None and error is None:
        raise InvalidParameters("--quiet needs INCIDENT")
    if error is not None:
        _acknowledge_error(error, note, quiet, as_json)
        return
    if incident is not None:
        _acknowledge(incident, note, quiet, as_json)
    elif run is not None:
        _acknowledge_run(run, note, as_json)
    else:
        _refuse_none(wanted)
        bulk.change_all("acknowledge", wanted, yes, as_json, note)


def _refuse_none(wanted: RunFilter) -> None:
    if wanted.is_empty:
        options = "--run, --task, --tag, --since or --ended-since"
        raise InvalidParameters(f"name an INCIDENT, or select failed runs by an option: {options}")


def _acknowledge(incident: str, note: str, quiet: str | None, as_json: bool) -> None:
    from batch_system import console
    from batch_system.verbs.incidents import AcknowledgeIncident

    until = clock.now() + age(quiet, "--quiet") if quiet is not None else None
    done = ask(
        lambda operations: operations(
            AcknowledgeIncident(incident=incident, note=note, quiet_until=until)
        ),
        needs_tasks=False,
    )
    if as_json:
        console.show_json(done)
        return
    runs = f", with {done.runs:,} failed run{'' if done.runs == 1 else 's'}" if done.runs else ""
    what = done.incident.task or done.incident.kind
    console.say(f"the incident of {what} is acknowledged by {done.incident.acknowledged_by}{runs}")


def _acknowledge_error(incident: str, note: str, quiet: str | None, as_json: bool) -> None:
    """Acknowledge an incident, and those that are one problem with it."""
    from batch_system import console
    from batch_system.operations.incidents import read
    from batch_system.verbs.incidents import AcknowledgeIncident

    until = clock.now() + age(quiet, "--quiet") if quiet is not None else None

    async def work(operations: Operations) -> list[Acknowledged]:
        meant = await read.with_same_error(operations.context, incident)
        return [
            await operations(AcknowledgeIncident(incident=each.id, note=note, quiet_until=until))
            for each in meant
        ]

    done = ask(work, needs_tasks=False)
    if as_json:
        console.show_json(done)
        return
    runs, number = sum(each.runs for each in done), len(done)
    console.say(
        f"{number:,} incident{' is' if number == 1 else 's are'} acknowledged by "
        f"{done[0].incident.acknowledged_by}, "
        f"with {runs:,} failed run{'' if runs == 1 else 's'}"
    )


def _acknowledge_run(run: str, note: str, as_json: bool) -> None:
    from batch_system import console
    from batch_system.verbs.run_changes import AcknowledgeRun

    done = ask(lambda operations: operations(AcknowledgeRun(run=run, note=note)), needs_tasks=False)
    if as_json:
        console.show_json(done)
    else:
        console.say(f"the failed run {done.id} of {done.task} is acknowledged")


@asks("asked", "batch_system.verbs.incidents:ListMessages", without=("limit", "after"))
def messages(asked: ListMessages, limit: Limit = 50, as_json: AsJson = False) -> None:
    """List the messages about incidents, the newest first: sent, waiting or given up."""
    from batch_system import console

    found = ask(lambda operations: pages(operations, asked, limit), needs_tasks=False)
    listed: list[Message] = [message for page in found for message in page.messages]
    if as_json:
        console.show_json(listed)
    elif listed:
        rows = [
            {**each.model_dump(), "incident": each.incident and short(each.incident)}
            for each in listed
        ]
        columns = ["created_at", "channel", "kind", "state", "incident", "attempts", "error"]
        console.show_fitted(rows, columns, ["error", "channel"])
    else:
        console.warn("batch: no message is like this")


@asks("asked", "batch_system.verbs.incidents:SendTestMessage", names={"channels": "--to"})
def send_test(asked: SendTestMessage, as_json: AsJson = False) -> None:
    """Send a test message to the channels of the settings.

    A running service sends it within seconds; `batch incidents` is not changed by it.
    """
    from batch_system import console

    sent = ask(lambda operations: operations(asked), needs_tasks=False)
    if as_json:
        console.show_json(sent)
    else:
        console.say(
            f"a test message is written for {', '.join(sent.channels)}; a running service sends it"
        )


def _columns(listed: list[Incident]) -> list[str]:
    """The columns that have a value in some row."""
    return [
        name for name in COLUMNS if any(getattr(incident, name) is not None for incident in listed)
    ]


def _row(problem: Sequence[Incident]) -> dict[str, Any]:
    """The row of an incident, or of several that form one problem."""
    incident = problem[0]
    row = {**incident.model_dump(), "id": short(incident.id)}
    if len(problem) == 1:
        return row
    return row | {
        "task": f"{len(problem):,} tasks",
        "count": sum(each.count for each in problem),
        "open": sum(each.open or 0 for each in problem),
    }
