"""The list of incidents: what needs a person, what closes by itself, and what is over."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from batch_system.batch.incidents import problem as one_error
from batch_system.batch.incidents.watched import NOBODY, Answering, answering
from batch_system.batch.ledger.states import CLOSE_BY_THEMSELVES, OF_RUNS, IncidentKind
from batch_system.errors import InvalidParameters
from batch_system.operations.incidents import read
from batch_system.operations.incidents.menders import Mender, menders
from batch_system.operations.incidents.read import Numbers
from batch_system.operations.incidents.results import MOST_INCIDENTS, Incident
from batch_system.pages.frame import formatting
from batch_system.pages.frame.files import list_file
from batch_system.pages.frame.formatting import duration
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import Tab, shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.verbs.incidents import ListIncidents
from batch_system.words import INCIDENTS

PAGE = 25
STATES = {"open": "open", "acknowledged": "open", "over": "closed"}
"""Which incidents can be shown, each with its state: open ones that nobody takes care of, open ones
that a person has acknowledged, and closed ones. Without any, all are.
"""
FILTERS = ("kind", "task", "owner")
NOBODY_MENDED: Mapping[str, Mender] = MappingProxyType({})


@dataclass(frozen=True)
class Row:
    """One incident, or several tasks that failed together with one error."""

    incident: Incident
    text: str
    name: str
    chip: str
    css: str
    icon: str
    elapsed: str
    owner: str | None
    runbook: str | None
    ended: str


def said(incident: Incident) -> str:
    """The text of an incident. What is not the error of a run begins like a sentence."""
    text = incident.text
    return text if incident.kind == IncidentKind.FAILED else f"{text[:1].upper()}{text[1:]}"


async def show_incidents(request: Request, viewer: Viewer) -> str:
    """Render the list. `?show=`: which of them, see STATES; `?kind=`, `?task=` and `?owner=`: only
    those. `?after=` is the cursor of a further page of what is over.
    """
    given = _given(request)
    after = request.query_params.get("after") or None
    context = viewer.operations.context
    wanted: dict[str, Any] = {name: given[name] for name in FILTERS if name in given}
    opened = await viewer.operations(ListIncidents(**wanted, limit=MOST_INCIDENTS))
    over = await viewer.operations(ListIncidents(**wanted, state="closed", limit=PAGE, after=after))
    names = {each.task for each in (*opened.incidents, *over.incidents) if each.task}
    async with context.databases.reading() as connection:
        owners = await answering(connection, names) if connection is not None else {}
    mended = await menders(context, over.incidents)
    rows = {
        **{name: _rows(its, owners, viewer) for name, its in _by_need(opened.incidents).items()},
        "over": _rows(over.incidents, owners, viewer, mended),
    }
    numbers = await read.numbers(context, **wanted)
    return await render(
        "incidents.html",
        **await shell_of(viewer, "incidents", "Incidents"),
        **rows,
        tabs=_tabs(given, len(rows["needs"]) + len(rows["watch"]), len(rows["taken"]), numbers),
        lately=_lately(numbers),
        shows=lambda which: given.get("show", which) == which,
        given=given,
        query=urlencode(given),
        chips=_chips(given),
        kinds=[(kind.value, INCIDENTS[kind].heading) for kind in IncidentKind],
        command=_command(given),
        last_closed=max(
            (each.closed_at for each in over.incidents if each.closed_at), default=None
        ),
        following=urlencode({**given, "after": over.after}) if over.after else None,
        is_first=after is None,
        has_more=opened.after is not None,
        owners=sorted({each.owner for each in owners.values() if each.owner}),
    )


def _by_need(opened: Sequence[Incident]) -> dict[str, list[Incident]]:
    """The open incidents: those that need a person, the oldest first; those that a person takes
    care of; and those that close by themselves.
    """
    waits = [each for each in opened if each.kind not in CLOSE_BY_THEMSELVES]
    return {
        "needs": [each for each in waits if each.acknowledged_at is None][::-1],
        "taken": [each for each in waits if each.acknowledged_at is not None],
        "watch": [each for each in opened if each.kind in CLOSE_BY_THEMSELVES],
    }


async def download_incidents(request: Request, viewer: Viewer) -> Response:
    """What the filter of the list finds as `?format=csv` or json, the newest first."""
    given = _given(request)
    show = given.pop("show", None)
    state = STATES.get(show or "", "all")
    wanted: dict[str, Any] = {**given, "state": state}
    asked = ListIncidents(**wanted, limit=MOST_INCIDENTS)

    def is_wanted(incident: Incident) -> bool:
        return state != "open" or (_is_taken(incident) == (show == "acknowledged"))

    return await list_file(request, viewer, "incidents", Incident, asked, is_wanted)


def _is_taken(incident: Incident) -> bool:
    """Whether a person takes care of an open incident."""
    return incident.acknowledged_at is not None and incident.kind not in CLOSE_BY_THEMSELVES


def _given(request: Request) -> dict[str, str]:
    """The conditions that are given, by name."""
    query = request.query_params
    given = {name: value for name in ("show", *FILTERS) if (value := query.get(name, "").strip())}
    if given.get("show") not in (None, *STATES):
        raise InvalidParameters(f"show: allowed are {', '.join(STATES)}")
    return given


def _lately(numbers: Numbers) -> str:
    """How many were opened lately, and how soon half of them were over; empty for none."""
    if not numbers.opened:
        return ""
    opened = f"{formatting.number(numbers.opened)}{'+' if numbers.opened >= read.COUNTED else ''}"
    words = f"{read.LATELY.days} days: {opened} opened"
    half = numbers.half_over_within
    return words if half is None else f"{words}, half of them over within {duration(half)}"


def _tabs(given: Mapping[str, str], opened: int, taken: int, numbers: Numbers) -> list[Tab]:
    """All incidents, and those of each state, with their numbers."""
    over = numbers.closed
    more = "" if numbers.is_all else "+"
    shown = {
        "": f"{opened + taken + over:,}{more}",
        "open": f"{opened:,}",
        "acknowledged": f"{taken:,}",
        "over": f"{over:,}{more}",
    }
    return [
        Tab(
            show.capitalize() or "All",
            _address(given, show=show),
            number,
            given.get("show", "") == show,
        )
        for show, number in shown.items()
    ]


def _chips(given: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """The name of each condition, its value in words, and the address without it."""
    words = {"kind": INCIDENTS[IncidentKind(given["kind"])].heading} if "kind" in given else {}
    return [
        (name, words.get(name, given[name]), _address(given, **{name: ""}))
        for name in FILTERS
        if name in given
    ]


def _address(given: Mapping[str, str], **other: str) -> str:
    query = urlencode({name: value for name, value in {**given, **other}.items() if value})
    return f"/incidents?{query}" if query else "/incidents"


def _command(given: Mapping[str, str]) -> str | None:
    """The command that lists the same; None if it tells open ones and acknowledged ones not
    apart.
    """
    state = STATES.get(given.get("show", ""), "all")
    if state == "open":
        return None
    options = {"state": state, **{name: given[name] for name in FILTERS if name in given}}
    return " ".join(
        ["batch incidents", *(f"--{name} {shlex.quote(value)}" for name, value in options.items())]
    )


def _rows(
    incidents: Sequence[Incident],
    owners: Mapping[str, Answering],
    viewer: Viewer,
    mended: Mapping[str, Mender] = NOBODY_MENDED,
) -> list[Row]:
    problems = one_error.groups(incidents, lambda each: each.of_problem)
    return [_row(problem, owners, viewer, mended.get(problem[0].id)) for problem in problems]


def _row(
    problem: Sequence[Incident],
    owners: Mapping[str, Answering],
    viewer: Viewer,
    mender: Mender | None,
) -> Row:
    incident = problem[0]
    its = [owners.get(each.task or "", NOBODY) for each in problem]
    number = sum(each.open if each.open is not None else each.count for each in problem)
    css, icon = ("failed", "circle-x") if incident.kind in OF_RUNS else ("retrying", "clock")
    if incident.kind == IncidentKind.MISSED:
        css, icon = "missed", "calendar-x"
    word = INCIDENTS[incident.kind]
    chip = word.chip or word.heading
    if incident.kind == IncidentKind.FAILED:
        chip = f"{formatting.counted(number, 'run')} failed"
    end = incident.closed_at or viewer.now
    return Row(
        incident=incident,
        text=said(incident),
        name=f"{len(problem):,} tasks"
        if len(problem) > 1
        else incident.task or word.subject or incident.subject or incident.kind,
        chip=chip,
        css="succeeded" if incident.closed_why == "made_good" else css,
        icon="circle-check" if incident.closed_why == "made_good" else icon,
        elapsed=duration((end - incident.opened_at).total_seconds()),
        owner=", ".join(sorted({each.owner for each in its if each.owner})) or None,
        runbook=its[0].runbook,
        ended=_how_it_ended(incident, mender),
    )


def _how_it_ended(incident: Incident, mender: Mender | None) -> str:
    if mender is not None:
        done = (
            f"backfilled {formatting.counted(mender.number, 'slot')}"
            if mender.is_backfill
            else f"retried {formatting.counted(mender.number, 'run')}"
        )
        return f"{mender.by} {done}" + (f": “{mender.note}”" if mender.note else "")
    by = incident.acknowledged_by
    if by is not None:
        return f"{by}: “{incident.note}”" if incident.note else f"{by} acknowledged it"
    return {"made_good": "Made good", "over": "Over by itself"}.get(incident.closed_why or "", "")
