"""The list of incidents: what needs a person, what closes by itself, and what is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request

from batch_system.batch.incidents import problem as one_error
from batch_system.batch.incidents.watched import NOBODY, Answering, answering
from batch_system.batch.ledger.states import CLOSE_BY_THEMSELVES, OF_RUNS, IncidentKind
from batch_system.errors import InvalidParameters
from batch_system.operations.incidents.results import MOST_INCIDENTS, Incident
from batch_system.pages.frame import formatting
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.verbs.incidents import ListIncidents
from batch_system.words import INCIDENTS

PAGE = 25
LONGEST_CURSOR = 100


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
    """Render the list. `?after=` is the cursor of a further page of what is over."""
    after = request.query_params.get("after") or None
    if after is not None and len(after) > LONGEST_CURSOR:
        raise InvalidParameters("after: allowed is the cursor that a page of this list has given")
    opened = await viewer.operations(ListIncidents(state="open", limit=MOST_INCIDENTS))
    over = await viewer.operations(ListIncidents(state="closed", limit=PAGE, after=after))
    names = {each.task for each in (*opened.incidents, *over.incidents) if each.task}
    async with viewer.operations.context.databases.reading() as connection:
        owners = await answering(connection, names) if connection is not None else {}
    waits = [each for each in opened.incidents if each.kind not in CLOSE_BY_THEMSELVES]
    needs = [each for each in waits if each.acknowledged_at is None]
    return await render(
        "incidents.html",
        **await shell_of(viewer, "incidents", "Incidents"),
        needs=_rows(needs[::-1], owners, viewer),
        watch=_rows(
            [each for each in opened.incidents if each.kind in CLOSE_BY_THEMSELVES],
            owners,
            viewer,
        ),
        taken=_rows([e for e in waits if e.acknowledged_at is not None], owners, viewer),
        over=_rows(over.incidents, owners, viewer),
        following=over.after,
        is_first=after is None,
        has_more=opened.after is not None,
    )


def _rows(incidents: Sequence[Incident], owners: dict[str, Answering], viewer: Viewer) -> list[Row]:
    problems = one_error.groups(incidents, lambda each: each.of_problem)
    return [_row(problem, owners, viewer) for problem in problems]


def _row(problem: Sequence[Incident], owners: dict[str, Answering], viewer: Viewer) -> Row:
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
        elapsed=formatting.duration((end - incident.opened_at).total_seconds()),
        owner=", ".join(sorted({each.owner for each in its if each.owner})) or None,
        runbook=its[0].runbook,
        ended=_how_it_ended(incident),
    )


def _how_it_ended(incident: Incident) -> str:
    by = incident.acknowledged_by
    if by is not None:
        return f"{by}: “{incident.note}”" if incident.note else f"{by} acknowledged it"
    return {"made_good": "Made good", "over": "Over by itself"}.get(incident.closed_why or "", "")
