"""`batch incidents`, `batch ack`, `batch mute`, `batch unmute` and `batch alerts test`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from service import clock
from service.cli import bulk, complete, filters
from service.cli.bulk import Yes
from service.cli.opening import ask
from service.cli.options import AsJson, Note, TaskName, age, instant, short, utc, whole
from service.errors import InvalidParameters

if TYPE_CHECKING:
    from service.operations.asking.filter import RunFilter
    from service.operations.incidents.results import Acknowledged, Incident
    from service.operations.operations import Operations

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
STATES = ("open", "closed", "all")

IncidentId = Annotated[
    str | None,
    typer.Argument(help="The id of the incident, or its last digits, as `batch incidents` shows."),
]


def incidents(
    state: Annotated[str, typer.Option(help="open, closed or all.")] = "open",
    kind: Annotated[
        str | None, typer.Option(help="Only incidents of this kind, such as failed or missed.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Only incidents of this task.", autocompletion=complete.task_names),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(
            parser=whole(1, 100_000),
            metavar="NUMBER",
            help="The largest number of incidents to show.",
        ),
    ] = 50,
    as_json: AsJson = False,
) -> None:
    """Show what needs a person, the newest first.

    An incident lasts from its first failure, or whatever else it is about, until that is made good
    or acknowledged.
    """
    from service import console
    from service.batch.incidents import problem as one_error
    from service.verbs.incidents import ListIncidents

    if state not in STATES:
        raise InvalidParameters(f"--state is {state!r}; allowed: {', '.join(STATES)}")

    async def work(operations: Operations) -> list[Incident]:
        listed: list[Incident] = []
        after: str | None = None
        while len(listed) < limit:
            page = await operations(
                ListIncidents(
                    state=cast(Literal["open", "closed", "all"], state),
                    kind=_kind(kind),
                    task=task,
                    limit=limit - len(listed),
                    after=after,
                )
            )
            listed += page.incidents
            after = page.after
            if after is None:
                break
        return listed

    listed = ask(work, needs_tasks=False)
    if len(listed) == limit:
        console.warn(
            f"batch: these are the newest {limit:,}; there may be more: --limit shows them"
        )
    if as_json:
        console.show_json(listed)
    elif listed:
        rows = [_row(problem) for problem in one_error.groups(listed, _error_of)]
        console.show_fitted(rows, _columns(listed), ["text", "task"])
    else:
        console.warn(
            "batch: no incident is open" if state == "open" else "batch: no incidents match"
        )


def ack(
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
    task: filters.OfTask = None,
    tag: filters.Tag = None,
    pool: filters.OfPool = None,
    since: filters.Since = None,
    ended_since: filters.EndedSince = None,
    text: filters.Text = None,
    error: filters.Error = None,
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
    wanted = filters.filter_of(
        task=task,
        tag=tag,
        pool=pool,
        state=None,
        origin=None,
        since=since,
        ended_since=ended_since,
        param=None,
        text=text,
    )
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
    from service import console
    from service.verbs.incidents import AcknowledgeIncident

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
    from service import console
    from service.operations.incidents import read
    from service.verbs.incidents import AcknowledgeIncident

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
    from service import console
    from service.verbs.run_changes import AcknowledgeRun

    done = ask(lambda operations: operations(AcknowledgeRun(run=run, note=note)), needs_tasks=False)
    if as_json:
        console.show_json(done)
    else:
        console.say(f"the failed run {done.id} of {done.task} is acknowledged")


def mute(
    name: TaskName,
    for_: Annotated[
        str | None,
        typer.Option("--for", metavar="AGE", help="For how long, such as 2h or 3d; at most 31d."),
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="Until when (ISO 8601), instead of --for.")
    ] = None,
    note: Note = None,
    as_json: AsJson = False,
) -> None:
    """Send nothing about a task for a while, such as during maintenance.

    The task goes on, and incidents are opened as ever. What is still open at the end is sent then.
    """
    from service import console
    from service.verbs.tasks import MuteTask

    if (for_ is None) == (until is None):
        raise InvalidParameters("give either --for or --until")
    end = clock.now() + age(for_, "--for") if for_ is not None else instant(until or "", "--until")
    muted = ask(
        lambda operations: operations(MuteTask(name=name, until=end, note=note)), needs_tasks=False
    )
    if as_json:
        console.show_json(muted)
    else:
        console.say(f"nothing is sent about {name} until {utc(muted.until)}")


def unmute(name: TaskName, as_json: AsJson = False) -> None:
    """Send messages about a task again."""
    from service import console
    from service.verbs.tasks import UnmuteTask

    was_muted = ask(lambda operations: operations(UnmuteTask(name=name)), needs_tasks=False)
    if as_json:
        console.show_json({"task": name, "was_muted": was_muted})
    else:
        console.say(
            f"messages about {name} are sent again" if was_muted else f"{name} is not muted"
        )


def send_test(
    to: Annotated[
        list[str] | None,
        typer.Option(
            help="Only to the channels of this name, such as payments or webhook. May be repeated."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send a test message to the channels of the settings.

    A running service sends it within seconds; `batch incidents` is not changed by it.
    """
    from service import console
    from service.verbs.incidents import SendTestMessage

    sent = ask(lambda operations: operations(SendTestMessage(channels=to or [])), needs_tasks=False)
    if as_json:
        console.show_json(sent)
    else:
        console.say(
            f"a test message is written for {', '.join(sent.channels)}; a running service sends it"
        )


def _kind(name: str | None) -> Any:
    from service.operations.incidents.facet import IncidentKind

    if name is None:
        return None
    if name not in set(IncidentKind):
        raise InvalidParameters(f"--kind is {name!r}; allowed: {', '.join(IncidentKind)}")
    return IncidentKind(name)


def _columns(listed: list[Incident]) -> list[str]:
    """The columns that have a value in some row."""
    return [
        name for name in COLUMNS if any(getattr(incident, name) is not None for incident in listed)
    ]


def _error_of(incident: Incident) -> tuple[str | None, datetime]:
    """What incidents that are one problem have in common, and when it was opened."""
    return (incident.error if incident.closed_at is None else None), incident.opened_at


def _row(problem: Sequence[Incident]) -> dict[str, Any]:
    """The row of an incident, or of several that are one problem."""
    incident = problem[0]
    row = {**incident.model_dump(), "id": short(incident.id)}
    if len(problem) == 1:
        return row
    return row | {
        "task": f"{len(problem):,} tasks",
        "count": sum(each.count for each in problem),
        "open": sum(each.open or 0 for each in problem),
    }
