"""Show the changes: filtered by person, kind, task, action and day, and as a file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from itertools import groupby
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from batch_system.concurrency.offload import offload
from batch_system.errors import InvalidParameters
from batch_system.operations.incidents.results import MOST_INCIDENTS
from batch_system.operations.people.changes import kind_of
from batch_system.operations.people.results import MOST_CHANGES, Change, ChangeCounts
from batch_system.pages.changes.outcomes import with_outcomes
from batch_system.pages.changes.sentences import KINDS, SERVICE, Line, lines_of
from batch_system.pages.frame import formatting
from batch_system.pages.frame.files import TYPES, attachment, csv_head, csv_rows
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.verbs.access import ListChanges
from batch_system.verbs.incidents import ListIncidents

PAGES_READ = 5
"""A page is about this many pages of the list of changes at most."""
SHOWN = 60
LONGEST_FILTER = 100
MOST_PEOPLE = 12
FILTERS = ("task", "action", "who", "kind", "from", "to")


@dataclass(frozen=True)
class Found:
    """The changes that the filter of task, action and days finds, the newest first. `after`: the
    cursor of older ones, if there are more. `numbers`: how many changes and incidents there are, by
    person and kind.
    """

    changes: Sequence[Change]
    lines: Sequence[Line]
    after: str | None
    numbers: Mapping[tuple[str, str], int]

    def by(self, name: str, given: Mapping[str, str | None]) -> Counter[str]:
        """How many have each value of `who` or `kind`, under the filters that are given."""
        numbers: Counter[str] = Counter()
        for (who, kind), number in self.numbers.items():
            if given.get("who") in (None, who) and given.get("kind") in (None, kind):
                numbers[who if name == "who" else kind] += number
        return numbers


async def show_changes(request: Request, viewer: Viewer) -> str:
    """The changes, with what went wrong in between."""
    given = _given(request)
    found = await _find(request, viewer, given, with_counts=True)
    who, kind = given.get("who"), given.get("kind")
    lines = [each for each in found.lines if who in (None, each.who) and kind in (None, each.kind)]
    people, kinds = found.by("who", {"kind": kind}), found.by("kind", {"who": who})
    first = _first(request)
    is_newest = not {"after", "to", "action"} & request.query_params.keys()
    newest = found.changes if is_newest else ()
    shown = await with_outcomes(lines[first : first + SHOWN], newest, viewer)
    more = {**given, "first": str(first + SHOWN)} if lines[first + SHOWN :] else None
    if more is None and found.after is not None:
        more = {**given, "after": found.after}
    return await render(
        "changes.html",
        **await shell_of(viewer, "changes", "Changes"),
        days=_days(shown, viewer),
        number=found.by("kind", given).total(),
        has_all=found.after is None,
        given=given,
        chips=_chips(given),
        people=_facet(given, "who", people),
        everyone=urlencode({each: kept for each, kept in given.items() if each != "who"}),
        all_kinds=urlencode({each: kept for each, kept in given.items() if each != "kind"}),
        of_kind=people.total(),
        of_person=kinds.total(),
        kinds=_facet(given, "kind", kinds),
        kinds_shown=KINDS,
        query=urlencode(given),
        older=urlencode(more) if more is not None else None,
        newest=urlencode(given) if first or request.query_params.get("after") else None,
        command=_command(given),
        service=SERVICE,
    )


async def download(request: Request, viewer: Viewer) -> Response:
    """The same changes as a file: `?format=csv` or json, with all that the API has."""
    given = _given(request)
    as_csv = request.query_params.get("format") == "csv"
    found = await _find(request, viewer, given)
    changes = [
        change.model_dump(mode="json")
        for change in found.changes
        if given.get("kind") in (None, kind_of(change.action))
        and given.get("who") in (None, SERVICE if change.source == "service" else change.actor)
    ]
    text = await offload(_csv if as_csv else json.dumps, changes)
    name = "csv" if as_csv else "json"
    return Response(text, media_type=TYPES[name], headers=attachment(f"changes.{name}"))


def _csv(changes: Sequence[dict[str, Any]]) -> str:
    columns = list(Change.model_fields)
    return csv_head(columns) + csv_rows(columns, changes)


def _given(request: Request) -> dict[str, str]:
    given = {
        name: value for name in FILTERS if (value := request.query_params.get(name, "").strip())
    }
    if any(len(value) > LONGEST_FILTER for value in given.values()):
        raise InvalidParameters(f"a filter has {LONGEST_FILTER} characters at most")
    if given.get("kind") not in (None, *KINDS):
        raise InvalidParameters(f"kind: allowed are {', '.join(KINDS)}")
    return given


async def _find(
    request: Request, viewer: Viewer, given: dict[str, str], *, with_counts: bool = False
) -> Found:
    since, until = _day(given, "from", viewer), _day(given, "to", viewer, timedelta(days=1))
    asked = ListChanges(
        limit=MOST_CHANGES,
        since=since or viewer.now - timedelta(days=3_650),
        until=until,
        task=given.get("task"),
        action=given.get("action"),
        after=request.query_params.get("after"),
        counts=with_counts,
    )
    changes: list[Change] = []
    counts: ChangeCounts | None = None
    begins_at_cursor = asked.after is not None
    for _ in range(PAGES_READ):
        page = await viewer.operations(asked)
        changes += page.changes
        counts = counts or page.counts
        asked = asked.model_copy(update={"after": page.after, "counts": False})
        if page.after is None:
            break
    oldest = changes[-1].at if asked.after is not None else since
    newest = changes[0].at if begins_at_cursor and changes else until
    incidents = []
    if "action" not in given:
        listed = await viewer.operations(
            ListIncidents(state="all", task=given.get("task"), limit=MOST_INCIDENTS)
        )
        incidents = [
            each
            for each in listed.incidents
            if (oldest is None or each.opened_at >= oldest)
            and (newest is None or each.opened_at < newest)
        ]
    numbers = Counter({(SERVICE, "failures"): len(incidents)} if incidents else {})
    for each in counts.by if counts is not None else ():
        numbers[each.who or SERVICE, each.kind] += each.number
    return Found(changes, await offload(lines_of, changes, incidents), asked.after, numbers)


def _day(
    given: dict[str, str], name: str, viewer: Viewer, plus: timedelta = timedelta()
) -> datetime | None:
    """The beginning of a day in the viewer's zone; None if none is given."""
    if (text := given.get(name)) is None:
        return None
    try:
        day = date.fromisoformat(text) + plus
        return datetime.combine(day, time(), viewer.zone).astimezone(UTC)
    except (ValueError, OverflowError):
        raise InvalidParameters(f"{name}: allowed is a day such as 2026-10-24") from None


def _first(request: Request) -> int:
    given = request.query_params.get("first", "0")
    return int(given) if given.isascii() and given.isdigit() and len(given) < 6 else 0


def _days(lines: Sequence[Line], viewer: Viewer) -> list[tuple[str, list[Line]]]:
    def day_of(line: Line) -> str:
        return formatting.day(line.at, viewer.zone, viewer.now)

    return [(day, list(of_day)) for day, of_day in groupby(lines, day_of)]


def _chips(given: dict[str, str]) -> list[tuple[str, str, str]]:
    """Each filter in force: its name, its value, and the address without it."""
    return [
        (name, value, urlencode({each: kept for each, kept in given.items() if each != name}))
        for name, value in given.items()
        if name not in ("who", "kind")
    ]


def _facet(
    given: dict[str, str], name: str, numbers: Counter[str]
) -> list[tuple[str, int, str, bool]]:
    """Each value of a filter: how many lines have it, its address, and whether it is chosen."""
    return [
        (value, number, urlencode({**given, name: value}), given.get(name) == value)
        for value, number in numbers.most_common(MOST_PEOPLE)
    ]


def _command(given: dict[str, str]) -> str:
    """The command that lists the same events."""
    options = {"task": "--task", "action": "--action", "from": "--since", "to": "--until"}
    values = dict(given)
    if "to" in values:  # the command leaves its end out
        values["to"] = str(date.fromisoformat(values["to"]) + timedelta(days=1))
    words = [f"{options[name]} {value}" for name, value in values.items() if name in options]
    return " ".join(["batch changes", *words])
