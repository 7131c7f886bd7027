"""The room of an incident: what broke, what differs from the last good run, and what to do now. The
links in messages lead here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from batch_system.batch.ledger.incidents.incidents import MORE
from batch_system.batch.ledger.states import OF_RUNS
from batch_system.concurrency.offload import offload
from batch_system.escaping import cut
from batch_system.operations.tasks import history
from batch_system.operations.why import room as rooms
from batch_system.operations.why.results import Comparison
from batch_system.operations.why.room import MOST_COUNTED, Beginning, Event, Room
from batch_system.operations.why.text import lines_of
from batch_system.pages.charts.strip_chart import strip_chart
from batch_system.pages.frame import formatting
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.pages.incidents.actions import CHANGES
from batch_system.pages.incidents.listing import said
from batch_system.pages.night.changes_in_words import settings_in_words
from batch_system.pages.runs.run_filter import address
from batch_system.verbs.why import WhyIncident
from batch_system.words import INCIDENTS

_LONGEST_NUMBER = 9
LONGEST_CHANGE = 100
_PARTS = {
    "version": "version",
    "file": "task file",
    "policy": "policies",
    "setting": "settings",
    "parameter": "parameters",
    "schedule": "schedule",
    "clock": "clock",
    "node": "host",
    "duration": "duration",
    "log": "kinds of log lines",
}


@dataclass(frozen=True)
class Station:
    """One event on the way. `css`: how it is marked. `after`: the time until the next one."""

    icon: str
    css: str
    what: str
    when: str
    words: str
    after: str


async def show_incident(request: Request, viewer: Viewer) -> str:
    """The page of an incident."""
    found = await rooms.room(viewer.operations.context, request.path_params["incident"])
    incident = found.incident
    word = INCIDENTS[incident.kind]
    what = incident.task or word.subject or incident.subject or incident.kind
    just_done = _just_done(request)
    return await render(
        "incident.html",
        **await shell_of(viewer, "incidents", f"Incident: {what}"),
        room=found,
        incident=incident,
        why=found.why,
        what=what,
        heading=_heading(found, what, viewer),
        sentence=_sentence(found, viewer),
        text=said(incident),
        owners=", ".join(sorted({each.owner for each in found.together if each.owner}))
        or found.owner,
        level="calm" if incident.closed_at else "bad" if incident.kind in OF_RUNS else "watch",
        **_way(found, viewer),
        **await _slots(found, viewer),
        same=_same(found.why.comparison),
        differ=_differ(found.why.comparison),
        mended_same=_same(found.why.mended),
        mended_differ=_differ(found.why.mended),
        of_error=_of_error(found),
        as_text="\n".join(lines_of(found.why)),
        is_of_runs=incident.kind in OF_RUNS,
        can_reopen=incident.acknowledged_at is not None or bool(just_done),
        just_done=just_done,
    )


async def _slots(found: Room, viewer: Viewer) -> dict[str, Any]:
    """The slots of the task around now, and its last days, while the incident is open and is about
    one task.
    """
    incident = found.incident
    if not incident.task or incident.closed_at is not None or found.together:
        return {"strip": None, "days": []}
    context = viewer.operations.context
    strip, days = await history.last_days(context, incident.task, str(viewer.zone))
    if not (strip.counts or strip.planned or strip.ahead):
        return {"strip": None, "days": days}
    return {"strip": await offload(strip_chart, strip, viewer.zone), "days": days}


def _of_error(found: Room) -> str:
    """The address of the runs that an incident is about, as far as the caller may know their error.
    An incident of further errors has no fingerprint of its own.
    """
    error = found.incident.fingerprint
    of_task = {"task": found.incident.task or ""}
    if error is None or error == MORE:
        return address(of_task, state="failed")
    return address(of_task, fingerprint=error)


def _same(compared: Comparison | None) -> str:
    """What is the same in both runs, such as "version and host"."""
    return formatting.sentence_list([_PARTS[each] for each in compared.same]) if compared else ""


def _differ(compared: Comparison | None) -> str:
    """Such as "3 things differ, 7 are the same"; empty without a comparison."""
    if compared is None:
        return ""
    number, same = len(compared.differences), len(compared.same)
    differs = f"{formatting.counted(number, 'thing')} {'differs' if number == 1 else 'differ'}"
    return f"{differs}, {same} {'is' if same == 1 else 'are'} the same"


async def download_text(request: Request, viewer: Viewer) -> Response:
    """The incident as text, for a ticket or a chat."""
    why = await viewer.operations(WhyIncident(incident=request.path_params["incident"]))
    return PlainTextResponse("\n".join(lines_of(why)) + "\n")


def _heading(found: Room, what: str, viewer: Viewer) -> str:
    incident = found.incident
    since = formatting.moment(incident.opened_at, viewer.zone, viewer.now)
    if found.together:
        return f"{len(found.together):,} tasks have failed with one error since {since}"
    if incident.closed_at is not None:
        closed = formatting.moment(incident.closed_at, viewer.zone, viewer.now)
        if incident.closed_why == "made_good":
            return f"{what} has worked again since {closed}"
        return f"{what}: {INCIDENTS[incident.kind].heading.lower()}, over since {closed}"
    if incident.kind not in OF_RUNS:
        return f"{what}: {INCIDENTS[incident.kind].heading.lower()} since {since}"
    if incident.kind != "failed":
        return f"{what}: {INCIDENTS[incident.kind].heading.lower()} since {since}"
    return failing(what, incident.count, since, found.failed, found.ended)


def failing(what: str, count: int, since: str, failed: int, ended: int | None) -> str:
    """The heading of an open incident of failed runs."""
    if count <= 1:
        return f"{what} failed once, {since}"
    if ended is None:
        return f"{what} has been failing since {since}: {failed:,} runs"
    more = " at least" if ended >= MOST_COUNTED else ""
    return f"{what} has been failing since {since}: {failed:,} of its last {ended:,} runs{more}"


def _sentence(found: Room, viewer: Viewer) -> str:
    """What came before it, in a sentence or two."""
    if found.incident.closed_at is not None:
        since = formatting.moment(found.incident.opened_at, viewer.zone, viewer.now)
        if found.incident.kind not in OF_RUNS:
            return f"It was opened {since}."
        number = formatting.counted(found.incident.count, "run")
        return f"It was opened {since}, about {number}."
    if found.incident.kind not in OF_RUNS:
        return ""
    changes = [event for event in found.events if event.kind == "change"]
    first = next((event for event in found.events if event.kind == "first"), None)
    last = changes[-1] if changes and first is not None else None
    beginning = Beginning(
        failed=found.failed,
        ended=found.ended,
        good_before=found.good_before,
        has_good=found.why.comparison is not None,
        change=last.action if last is not None else None,
        before=(first.at - last.at).total_seconds()
        if first is not None and last is not None
        else None,
    )
    return began(beginning)


def began(found: Beginning) -> str:
    """What came before an incident of runs, in a sentence or two."""
    sentences = []
    if found.before is not None:
        words = CHANGES.get(found.change or "", "something changed")
        sentences.append(f"It began {formatting.duration(found.before)} after {words}.")
    elif found.has_good:
        sentences.append("No change is recorded between the last good run and the first bad one.")
    if found.good_before:
        least = "at least " if found.good_before >= MOST_COUNTED else ""
        number = formatting.counted(found.good_before, "run")
        sentences.append(f"Before it, {least}{number} in a row succeeded.")
    return " ".join(sentences)


def _way(found: Room, viewer: Viewer) -> dict[str, Any]:
    """The stations. One alone is no way: a next slot then stands among the facts, and the heading
    says since when it fails or is over.
    """
    alone = found.events[0] if len(found.events) == 1 else None
    is_shown = alone is None or alone.kind == "outage"
    return {
        "stations": _stations(found, viewer) if is_shown else [],
        "next_slot": alone.at if alone is not None and alone.kind == "next" else None,
    }


def _stations(found: Room, viewer: Viewer) -> list[Station]:
    events = found.events
    later = [event.at for event in events[1:]]
    gaps = [
        formatting.duration((at - event.at).total_seconds())
        for event, at in zip(events, later, strict=False)
    ]
    # The last one has no gap behind it. An incident of a pool may have no event at all.
    return [
        _station(event, gap, found, viewer) for event, gap in zip(events, [*gaps, ""], strict=False)
    ]


def _station(event: Event, gap: str, found: Room, viewer: Viewer) -> Station:
    when = formatting.moment(event.at, viewer.zone, viewer.now)
    compared = found.why.comparison
    if event.kind == "good" and compared is not None:
        seconds = compared.good.seconds
        took = f"took {formatting.duration(seconds)}" if seconds is not None else ""
        return Station("circle-check", "ok", "Last good", when, took, gap)
    if event.kind == "change":
        words = cut(_change_in_words(event), LONGEST_CHANGE)
        is_deploy = event.action == "service.deploy"
        icon, what = ("rocket", "Deploy") if is_deploy else ("settings-2", "Change")
        return Station(icon, "", what, when, words, gap)
    if event.kind == "first":
        seconds = compared.bad.seconds if compared is not None else None
        took = f"failed after {formatting.duration(seconds)}" if seconds is not None else ""
        return Station("circle-x", "no bad-after", "First failure", when, took, gap)
    if event.kind == "outage":
        words = formatting.counted(event.number, "slot") + " missed"
        return Station("unplug", f"out{_bad_after(found)}", "Missed", when, words, gap)
    if event.kind == "newest":
        ago = formatting.relative(event.at, viewer.now)
        return Station("circle-x", f"no{_bad_after(found)}", "Newest failure", when, ago, gap)
    if event.kind == "closed":
        return Station("circle-check", "ok", "Over", when, "", "")
    ago = formatting.relative(event.at, viewer.now)
    return Station("calendar-clock", "", "Next slot", when, ago, "")


def _bad_after(found: Room) -> str:
    """The style of the way behind a station of an incident that is not over."""
    is_bad = found.incident.closed_at is None and found.incident.kind == "failed"
    return " bad-after" if is_bad else ""


def _change_in_words(event: Event) -> str:
    before = event.before if isinstance(event.before, dict) else {}
    after = event.after if isinstance(event.after, dict) else {}
    if event.action == "service.deploy":
        return f"{before.get('application') or '?'} → {after.get('application') or '?'}"
    if event.action == "settings.change":
        return settings_in_words(event.before, event.after)
    if event.action == "schedule.change":
        return f"{before.get('cron', 'none')} → {after.get('cron', 'none')}"
    return CHANGES.get(event.action or "", "")


def _just_done(request: Request) -> str:
    """What an acknowledgement that left later failures open has just done."""
    numbers = [request.query_params.get(name, "") for name in ("acknowledged", "still_open")]
    if not all(
        number.isascii() and number.isdigit() and len(number) < _LONGEST_NUMBER
        for number in numbers
    ):
        return ""
    acknowledged, still_open = map(int, numbers)
    verb = "it is" if still_open == 1 else "they are"
    return (
        f"{formatting.counted(acknowledged, 'run')} acknowledged; {still_open:,} failed since, "
        f"{verb} still open."
    )
