"""The home page: what happened last night, and what needs a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from starlette.requests import Request

from batch_system.concurrency.offload import offload
from batch_system.operations.night.page import NightPage, night_page
from batch_system.operations.night.results import Night, SlotForecast
from batch_system.operations.tasks import listing
from batch_system.pages.charts.forecast_chart import PathChart, path_chart
from batch_system.pages.charts.late_bar import late_bar
from batch_system.pages.charts.night_chart import axis_of, moments_of, night_chart
from batch_system.pages.charts.night_lanes import night_lane
from batch_system.pages.charts.spark_chart import spark_chart
from batch_system.pages.frame import formatting
from batch_system.pages.frame.blocks import attempt, render_blocks
from batch_system.pages.frame.shell import LiveViewer, shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.pages.frame.window import evening, window_in, window_in_words
from batch_system.pages.night.changes_in_words import lines_of
from batch_system.pages.night.empty import show_empty

MOST_ROWS = 20
"""At most this many rows of what needs a person are shown in full; a bad night may have
hundreds.
"""
MOST_CHARTS = 5
"""The paths of at most this many late promises are drawn."""
BLOCKS = (
    *("chart", "forecast", "needs", "late", "missing", "changes", "next", "backup", "lanes"),
    "verdict",
)
"""The blocks of the page. The verdict is the last one, because it says whether all others could be
rendered.
"""


async def show_night(request: Request, viewer: Viewer) -> str:
    """Render the page. `?since=night` (the default), `24h` or an instant; `until=` an instant."""
    if not isinstance(viewer, LiveViewer) and not await listing.are_known(
        viewer.operations.context
    ):
        return await show_empty(viewer, "night")
    since, until, choice = window_in(request, viewer)
    page = await night_page(viewer.operations.context, since, until, str(viewer.zone))
    found = page.night
    until = until if until is not None and until < found.as_of else None
    values = {
        **await shell_of(viewer, "night", _title(found)),
        "page": page,
        "night": found,
        **await offload(_drawn, page, viewer),
        "choice": choice,
        "tonight": evening(viewer),
        "window_from": _for_a_field(found.since, viewer),
        "window_until": _for_a_field(until or found.as_of, viewer),
        "is_over": until is not None,
        "end": until or found.as_of,
        "heading": _heading(found, until, viewer),
        "window": window_in_words(found.since, until, found.as_of, viewer),
    }
    shown = viewer.parts if isinstance(viewer, LiveViewer) else BLOCKS
    return await render_blocks("night.html", shown, values)


def _drawn(page: NightPage, viewer: Viewer) -> dict[str, Any]:
    """What blocks need beside the night itself. Computed in a thread.

    Values that can't be computed are left out, and the blocks that need them say so.
    """
    found = page.night
    drawings: Mapping[str, Callable[[], dict[str, Any]]] = {
        "charts": lambda: _charts(page, viewer),
        "changes": lambda: {
            "changes": lines_of(found.changes, found.needs, found.since, _outages(found))
        },
        "late": lambda: {
            "late_bars": [late_bar(run, found.as_of, viewer.zone) for run in found.late]
        },
        "sparks": lambda: {
            "sparks": {task: spark_chart(runs) for task, runs in page.sparks.items()}
        },
        "needs": lambda: _rows(page, viewer),
        "forecast": lambda: _promises(found, viewer),
    }
    drawn: dict[str, Any] = {}
    for name, draw in drawings.items():
        drawn |= attempt(name, draw) or {}
    return drawn


def _rows(page: NightPage, viewer: Viewer) -> dict[str, Any]:
    """What needs a person: MOST_ROWS as whole rows, the others as lines, and those that are older
    than the night.

    The last runs of a task stand in its first row only.
    """
    begin, needs = page.night.since, page.night.needs
    is_old = [need.last_failed is not None and need.last_failed < begin for need in needs]
    fresh = [need for need, old in zip(needs, is_old, strict=True) if not old]
    older = [need for need, old in zip(needs, is_old, strict=True) if old]
    first_of = {need.task: need for need in reversed([*fresh, *older])}
    rows, old_rows = (
        [
            (need, _facts(page, need, viewer, is_first=first_of[need.task] is need))
            for need in some[:MOST_ROWS]
        ]
        for some in (fresh, older)
    )
    more = {"further": fresh[MOST_ROWS:], "older_further": older[MOST_ROWS:]}
    return {"rows": rows, "old_rows": old_rows, **more}


def _promises(found: Night, viewer: Viewer) -> dict[str, Any]:
    """The promises, each with the chart of its path if it will be late, and how many others of the
    same task have the same state: those that are kept or on time have one line for each task.
    """
    slots = found.forecast.slots if found.forecast is not None else []
    numbers = Counter((each.task, each.state) for each in slots)
    shown: dict[object, SlotForecast] = {}
    for each in slots:
        is_danger = each.state in ("late", "at_risk")
        key = each.slot if is_danger else None
        if each.state == "kept":  # of these, the newest one
            shown.pop((each.task, each.state, key), None)
        shown.setdefault((each.task, each.state, key), each)
    rows: list[tuple[SlotForecast, PathChart | None, int]] = []
    for each in list(shown.values())[:MOST_ROWS]:
        is_drawn = each.state == "late" and not each.path[-1].is_over and len(rows) < MOST_CHARTS
        chart = path_chart(each, found.as_of, viewer.zone) if is_drawn else None
        others = 0 if each.state in ("late", "at_risk") else numbers[each.task, each.state] - 1
        rows.append((each, chart, others))
    return {"promises": rows, "promises_left": max(0, len(shown) - MOST_ROWS)}


def _outages(found: Night) -> list[tuple[datetime, datetime]]:
    return [
        (each.begin, each.until)
        for each in found.did_not_run
        if each.cause == "down" and each.begin and each.until
    ]


def _charts(page: NightPage, viewer: Viewer) -> dict[str, Any]:
    """The chart and the lanes."""
    found, length = page.night, timedelta(seconds=page.column)
    axis, outages = axis_of(page.columns, length, viewer.zone), _outages(found)
    now = found.as_of if found.next is not None else None
    chart = night_chart(
        page.columns,
        axis,
        length,
        now,
        moments_of(found.needs, found.changes, found.since),
        outages,
    )
    ten_minutes = axis.width(axis.begin, axis.begin + timedelta(minutes=10))
    lanes = [night_lane(lane, axis, now, ten_minutes) for lane in page.lanes.lanes]
    rest = (
        night_lane(page.lanes.rest, axis, now, ten_minutes) if page.lanes.rest is not None else None
    )
    return {
        "chart": chart,
        "lanes": lanes,
        "rest": rest,
    }


def _title(found: Night) -> str:
    number = len(found.needs) + found.more.get("needs", 0)
    return f"({number}) Night" if number else "Night"


def _for_a_field(at: datetime, viewer: Viewer) -> str:
    """An instant in the viewer's zone, as a field of a form has it."""
    return at.astimezone(viewer.zone).strftime("%Y-%m-%dT%H:%M")


def _heading(found: Night, until: datetime | None, viewer: Viewer) -> str:
    local = (until or found.as_of).astimezone(viewer.zone)
    return f"Night to {local:%A} {local.day} {local:%B}"


def _facts(page: NightPage, need: Any, viewer: Viewer, is_first: bool) -> dict[str, Any]:
    """The words of a row: since when it has failed, and when it was first seen. `is_first`: whether
    it is the first row of its task.
    """
    found, sparks = page.night, page.sparks.get(need.task or "", ())
    ended = [spark.state for spark in sparks if spark.state in ("succeeded", "failed")]
    bad = ended.count("failed")
    in_a_row = next(
        (number for number, state in enumerate(reversed(ended)) if state == "succeeded"), len(ended)
    )
    is_each = in_a_row and in_a_row >= need.open
    share = "each run since" if is_each else f"{bad} of its last {len(ended)} runs" if bad else ""
    now, zone = found.as_of, viewer.zone
    since = formatting.moment(need.failing_since, zone, now) if need.failing_since else "–"
    elapsed = (
        formatting.duration((now - need.failing_since).total_seconds())
        if need.failing_since
        else ""
    )
    after = ""
    if need.after is not None:
        what = need.after.version or {
            "service.start": "a restart",
            "settings.change": "a new setting",
        }.get(need.after.kind, "a change of its schedule")
        after = f"{formatting.duration(need.after.seconds)} after {what}"
    is_new = need.first_seen is not None and need.first_seen >= found.since
    first = formatting.moment(need.first_seen, zone, now) if need.first_seen else "–"
    line = need.last_line
    is_of_first = need.first_seen is None or need.first_seen == need.failing_since
    behind, after = ("", after) if is_of_first else (after, "")
    return {
        "has_spark": is_first,
        "line_at": formatting.log_time(line.at, zone) if line is not None else "",
        "since": since,
        "elapsed": ", ".join(filter(None, (elapsed, share, behind))),
        "first": f"{first}, new" if is_new else first,
        "after": after or ("no change right before" if is_new and "succeeded" in ended else ""),
    }
