"""The charts: no state is told by its colour alone, and where the clocks change times can't be
confused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from batch_system.operations.night.lanes import Cell, Lane, LaneRun
from batch_system.operations.night.page import Column
from batch_system.operations.night.results import ForecastStep, SlotForecast
from batch_system.operations.night.sparks import Spark
from batch_system.operations.tasks.history import Day, TaskHistory
from batch_system.operations.tasks.results import TaskSummary
from batch_system.operations.tasks.strip import Strip, StripCell
from batch_system.operations.tasks.timeline import AttemptSpan, TaskLane, Timeline
from batch_system.pages.charts.axis import Axis
from batch_system.pages.charts.day_map import day_map
from batch_system.pages.charts.forecast_chart import path_chart
from batch_system.pages.charts.night_chart import axis_of, night_chart
from batch_system.pages.charts.night_lanes import drawn, night_lane
from batch_system.pages.charts.paths import Paths
from batch_system.pages.charts.spark_chart import spark_chart
from batch_system.pages.charts.strip_chart import strip_chart
from batch_system.pages.charts.timeline import timeline_drawn
from batch_system.pages.frame.assets import STATIC, STYLES
from batch_system.pages.frame.render import environment
from tests.pages.conftest import People

UTC_ZONE, BERLIN = ZoneInfo("UTC"), ZoneInfo("Europe/Berlin")
NOW = datetime(2026, 10, 25, 6, 42, tzinfo=UTC)
BACK = datetime(2026, 10, 25, 1, 0, tzinfo=UTC)
"""At this instant the clocks of Berlin go back from 03:00 to 02:00."""
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
MARKS = {
    "failed": ("url(#hatch-failed)", "u-failed"),
    "interrupted": ("url(#hatch-interrupted)", "u-interrupted"),
    "retrying": ("url(#hatch-retrying)", None),
    "cancelled": (None, "u-cancelled"),
    "queued": (None, None),
    "succeeded": (None, None),
}
"""The hatch of the bar of each state, and the mark below it."""


def template(name: str) -> Any:
    return environment().get_template(name).module


def run(state: str, begin: datetime = NOW - HOUR, end: datetime | None = NOW - MINUTE) -> LaneRun:
    return LaneRun(id=f"r-{state}", slot=begin, state=state, created_at=begin, begin=begin, end=end)


def bars(html: str) -> Iterator[tuple[str, str]]:
    """The tag of each bar, and what follows it up to the next one."""
    for found in re.finditer(r'<rect[^>]*class="bar-\w+"[^>]*>(?:(?!<rect).)*', html, re.DOTALL):
        tag, _, rest = found[0].partition(">")
        yield tag, rest


def check(html: str, state: str) -> None:
    """The one bar of this drawing has a title, and what the state's bar has to have."""
    hatch, mark = MARKS[state]
    ((tag, rest),) = bars(html)
    assert rest.startswith("<title>")
    assert re.findall(r'fill="([^"]+)"', tag) == ([hatch] if hatch else [])
    assert re.findall(r"u-\w+", rest) == ([mark] if mark else [])


def timeline_of(lane: Lane) -> Timeline:
    lanes = [TaskLane(lane=lane, ahead=0, expected=None, attempts={})]
    return Timeline(now=NOW, hours=12, lanes=lanes, without=[], accounted_from=None)


@pytest.mark.parametrize("state", MARKS)
def test_a_bar_has_the_hatch_and_the_mark_of_its_state(state: str) -> None:
    axis = Axis(NOW - 12 * HOUR, NOW + 2 * HOUR, UTC_ZONE)
    chart = SimpleNamespace(ticks=[], now=None, outages=[], clock_changes=[])
    lane = Lane(task="load", counts={}, runs=[run(state)])
    check(template("charts.html").lane(drawn(lane, axis, NOW, 1.0), chart, ""), state)
    found = timeline_of(lane)
    tasks = {"load": TaskSummary(source="load.py", name="load")}
    timeline = timeline_drawn(found, tasks, None, UTC_ZONE)
    check(template("timeline.html").row(timeline.groups[0].lanes[0], timeline, ""), state)


def test_only_a_run_that_runs_ends_in_a_round_head() -> None:
    axis = Axis(NOW - 12 * HOUR, NOW + 2 * HOUR, UTC_ZONE)
    chart = SimpleNamespace(ticks=[], now=None, outages=[], clock_changes=[])
    for state, heads in (("running", 1), ("queued", 0), ("retrying", 0), ("interrupted", 0)):
        lane = Lane(task="load", counts={}, runs=[run(state, end=None)])
        html = template("charts.html").lane(night_lane(lane, axis, NOW, 1.0), chart, "")
        assert html.count('r="4.5"') == heads, state


def test_the_attempts_of_a_run_have_their_own_hatches() -> None:
    lane = Lane(task="load", counts={}, runs=[run("failed")])
    spans = [
        AttemptSpan(
            begin=NOW - (60 - 10 * n) * MINUTE, end=NOW - (55 - 10 * n) * MINUTE, outcome=outcome
        )
        for n, outcome in enumerate(("failed", "interrupted", "failed"))
    ]
    found = Timeline(
        now=NOW,
        hours=3,
        lanes=[TaskLane(lane=lane, ahead=0, expected=None, attempts={"r-failed": spans})],
        without=[],
        accounted_from=None,
    )
    timeline = timeline_drawn(
        found, {"load": TaskSummary(source="load.py", name="load")}, None, UTC_ZONE
    )
    html = template("timeline.html").row(timeline.groups[0].lanes[0], timeline, "")
    assert re.findall(r"hatch-(\w+)", html) == ["retrying", "interrupted", "failed"]
    assert re.findall(r"u-(\w+)", html) == ["interrupted", "failed"]


def test_each_cell_of_a_dense_lane_that_is_not_all_good_has_a_mark() -> None:
    axis = Axis(NOW - 12 * HOUR, NOW + 2 * HOUR, UTC_ZONE)
    marks = {
        "failed": "failed",
        "missed": "missed",
        "unaccounted": "unaccounted",
        "active": "running",
    }
    marks |= {"skipped": "skipped", "paused": "skipped", "cancelled": "cancelled"}
    for name, mark in marks.items():
        lane = Lane(
            task="load", counts={}, cells=[Cell(at=NOW - HOUR, counts={name: 1, "succeeded": 70})]
        )
        (cell,) = drawn(lane, axis, NOW, 1.0).cells
        html = template("charts.html").cell(cell)
        assert "<title>" in html and f'href="#mark-{mark}"' in html, name
    assert "mark-" not in template("charts.html").cell(
        SimpleNamespace(**{**cell._asdict(), "css": "cell-succeeded"})
    )


def test_each_day_of_the_map_that_is_not_all_good_has_a_mark() -> None:
    names = (
        "failed",
        "missed",
        "unaccounted",
        "active",
        "skipped",
        "paused",
        "cancelled",
        "succeeded",
    )
    first = NOW.date() - timedelta(days=len(names))
    days = [
        Day(date=first + timedelta(days=n), worst=name, counts={name: 1})
        for n, name in enumerate(names)
    ]
    cells = [
        StripCell(at=NOW - (n + 1) * HOUR, is_slot=True, counts={name: 1})
        for n, name in enumerate(names)
    ]
    counts = dict.fromkeys(names, 1)
    strip = Strip(
        begin=NOW - 24 * HOUR,
        now=NOW,
        end=NOW + 12 * HOUR,
        counts=counts,
        cells=cells,
        planned=[NOW + HOUR],
        ahead=1,
        next=[],
    )
    history = TaskHistory(
        now=NOW, zone="UTC", strip=strip, days=days, counts=counts, known_from=first, runs=[]
    )
    html = template("task_charts.html").map(day_map(history))
    assert html.count("<title>") == len(names)
    assert sorted(re.findall(r'class="mark-(\w+)"', html)) == sorted(
        ("failed", "missed", "unaccounted", "running", "skipped", "skipped", "cancelled")
    )
    # So has each slot of the strip, and each hour of the one for a phone.
    drawn_strip = strip_chart(strip, UTC_ZONE)
    assert drawn_strip.words.endswith(", 1 to come")
    for boxes in (drawn_strip.boxes, drawn_strip.hours):
        html = template("task_charts.html").strip(drawn_strip, boxes, "pw", "The strip")
        marks = re.findall(r"(?:mark|u)-(\w+)|(hatch-failed)|(bar-running)", html)
        assert {"".join(each) for each in marks} == {
            *("failed", "hatch-failed", "missed", "unaccounted", "skipped", "cancelled"),
            "bar-running",
        }


def test_below_the_line_of_the_night_failed_is_solid_missed_is_split_and_chosen_is_thin() -> None:
    counts = {"failed": 2, "missed": 3, "unaccounted": 1, "paused": 4}
    columns = [Column(at=NOW - HOUR, counts=counts)]
    chart = night_chart(columns, axis_of(columns, HOUR, UTC_ZONE), HOUR, None, [], [])
    assert {box.css for box in chart.columns.boxes} == {"split", "cell-unaccounted"}
    (chosen,) = chart.columns.paths.drawn()
    assert (chosen.css, chosen.thickness) == ("f-skipped", "1.6")
    (failed,) = chart.columns.paths.told
    assert failed.css == "f-failed" and failed.marks[0].title == "05:42 to 06:42: 2 failed"
    html = template("charts.html").night(chart, 184)
    assert html.count("url(#hatch-split)") == 1 and html.count("<title>") == 3
    assert chart.classes == ["paused", "missed", "failed", "unaccounted"]
    assert chart.rows == [("05:42", ["4", "3", "2", "1"])]


def test_a_small_chart_marks_each_run_that_has_not_succeeded() -> None:
    marks = {"failed": "dot-failed", "cancelled": "u-cancelled", "interrupted": "u-interrupted"}
    for state, mark in {**marks, "running": "dot-active", "succeeded": ""}.items():
        html = template("charts.html").spark(
            spark_chart([Spark(run="r", state=state, seconds=1.0)])
        )
        assert f"1 {state}" in html
        drawn_marks = re.findall(r"(?:dot|u)-\w+", html)
        assert drawn_marks == ([mark] if mark else []), state


def test_no_style_beats_the_hatch_of_a_bar() -> None:
    css = "".join((STATIC / name).read_text() for name in STYLES)
    for name in ("bar-failed", "bar-retrying", "bar-interrupted", "split"):
        for selectors in re.findall(rf"([^{{}}]*\.{name}\b[^{{}}]*)\{{[^}}]*\bfill:", css):
            assert f".{name}:not([fill])" in selectors, selectors
    outlined = css.partition("@media (forced-colors: active)")[2].partition("stroke: CanvasText")[0]
    assert all(
        name in outlined
        for name in ('[class*="bar-"]', '[class*="cell-"]', ".split", ".h-ok", ".s-under")
    )


def test_many_narrow_bars_of_one_state_are_one_link_to_all_their_runs() -> None:
    def at(number: int, state: str) -> LaneRun:
        begin = NOW - 10 * HOUR + number * 15 * MINUTE
        return LaneRun(
            id=f"r-{number}", slot=begin, state=state, created_at=begin, begin=begin, end=begin
        )

    axis = Axis(NOW - 12 * HOUR, NOW + 2 * HOUR, UTC_ZONE)
    chart = SimpleNamespace(ticks=[], now=None, outages=[], clock_changes=[])
    for failed, links in ((3, 3), (4, 1), (20, 1)):
        runs = [
            at(number, "failed" if 5 <= number < 5 + failed else "succeeded")
            for number in range(30)
        ]
        html = template("charts.html").lane(
            night_lane(Lane(task="load", counts={}, runs=runs), axis, NOW, 1.0), chart, "/b"
        )
        assert html.count("<a ") == links
        assert len(re.findall(r"u-failed|×", html)) == failed, "each has its mark"
    assert (
        'href="/b/runs?task=load&amp;state=failed&amp;slot_since=2026-10-24T21:57:00Z'
        '&amp;slot_until=2026-10-25T02:42:01Z"' in html
    )
    assert "<title>load 21:57 to 02:42: 20 failed</title>" in html


def test_marks_that_are_alike_are_one_line_with_dashes_and_the_others_stay_where_they_are() -> None:
    def drawn_row(*places: tuple[float, float]) -> list[tuple[str, str | None]]:
        paths = Paths()
        for x, width in places:
            paths.add_box(SimpleNamespace(x=x, width=width, css="bar-succeeded"), 19, 13)
        return [(each.path, each.dashes) for each in paths.drawn()]

    alike = [(10 + n * 1.123, 0.94) for n in range(60)]
    assert drawn_row(*alike) == [("M1000 25.5h6720", "94.00 18.30")]
    assert drawn_row(*alike[:30], *alike[33:]) == [("M1000 25.5h3351m355 0h3014", "94.00 18.30")]
    assert drawn_row(*alike[:3], (30, 5)) == [("M1000 25.5h94m18 0h94m19 0h94m1681 0h500", None)]
    assert drawn_row((10, 0.3), (10, 0.3)) == [("M1000 25.5h30m-30 0h30", None)]


async def test_each_hatch_that_a_page_uses_is_on_it_once(people: People) -> None:
    run = (await people.operator.send("/tasks/report/start", **{"param-day": "never"})).headers[
        "location"
    ]
    for _ in range(200):
        if "Failed" in await people.viewer.page(run):
            break
    for path in ("/", "/tasks", "/tasks/report", run):
        html = await people.viewer.page(path)
        used = set(re.findall(r"url\(#([\w-]+)\)", html))
        assert "hatch-failed" in used or path in ("/", "/tasks/report")
        for name in used:
            assert html.count(f'<pattern id="{name}"') == 1, (path, name)


def test_where_the_clocks_change_the_lanes_have_a_line_a_label_and_times_with_offsets() -> None:
    columns = [Column(at=BACK - 7 * HOUR + n * HOUR, counts={"succeeded": 1}) for n in range(14)]
    axis = axis_of(columns, HOUR, BERLIN)
    chart = night_chart(columns, axis, HOUR, None, [], [])
    assert [(change.x, change.label) for change in chart.clock_changes] == [(50.0, "03:00 → 02:00")]
    assert [time for time, _ in chart.rows][6:8] == ["02:00 +02:00", "02:00 +01:00"]
    charts = template("charts.html")
    head = charts.lane_head(chart)
    assert [tick.label for tick in chart.ticks].count("02:00") == 2, (
        "the hour that is repeated is drawn twice"
    )
    assert head.count("03:00 → 02:00") == 1 and head.count(">02:00<") == 1, (
        "the label has the place of the second one"
    )
    lane = Lane(
        task="load",
        counts={},
        runs=[run("succeeded", BACK - HOUR / 2, BACK), run("failed", BACK + HOUR / 2)],
    )
    html = charts.lane(drawn(lane, axis, None, 1.0), chart, "")
    assert '<line x1="50%" x2="50%" y2="100%" class="s-mark"/>' in head and "#lane-back" in html
    assert "load 02:30 +02:00: succeeded" in html and "load 02:30 +01:00: failed" in html


def test_the_timeline_of_tasks_has_them_too_and_other_days_have_none() -> None:
    lane = Lane(task="load", counts={}, runs=[run("succeeded", BACK - HOUR / 2, BACK)])
    tasks = {"load": TaskSummary(source="load.py", name="load")}
    for zone, line, time in ((BERLIN, 1, "02:30 +02:00"), (UTC_ZONE, 0, "00:30")):
        found = timeline_of(lane)
        timeline = timeline_drawn(found, tasks, None, zone)
        lines = template("timeline.html")
        html = lines.row(timeline.groups[0].lanes[0], timeline, "")
        head = lines.head(timeline, 12)
        assert f"load {time}: succeeded" in html and "#lane-back" in html
        assert head.count('class="s-mark"') == line and head.count("03:00 → 02:00") == line


def test_the_path_of_a_promise_is_drawn_in_its_order_and_its_words_stand_where_they_fit() -> None:
    def step(task: str, begins: float, ends: float, state: str | None, **more: Any) -> ForecastStep:
        return ForecastStep(
            task=task,
            slot=NOW - 4 * HOUR,
            run=None,
            state=state,
            is_over=state == "succeeded",
            obstacle=None,
            begins_at=NOW + begins * HOUR,
            ends_at=NOW + ends * HOUR,
            usual=1_800.0,
            **more,
        )

    path = [
        step("orders", -4, -3.9, "succeeded"),
        step("a_name_of_more_than_18_characters", -3.9, 0.5, "running", done=89, total=100),
        step("report", 0.5, 1, "waiting"),
    ]
    found = SlotForecast(
        task="report",
        slot=NOW - 4 * HOUR,
        deadline=NOW + HOUR / 3,
        state="late",
        ends_at=NOW + HOUR,
        retry_until=None,
        text="",
        why="",
        path=path,
    )
    chart = path_chart(found, NOW, BERLIN)
    _, second, last = chart.rows
    assert [bar.css for row in chart.rows for bar in row.bars] == [
        *("f-succeeded", "f-running", "s-exp", "s-exp")
    ]
    assert second.name == "a_name_of_more_th…" and second.is_inside
    assert second.words == "since 03:48, 89 % done, about 08:12"
    assert last.is_left and last.words == "waits for it, then takes about 30 min"
    assert chart.now < chart.promised < (chart.about or 0) < 100
    assert all(bar.x + bar.width <= 100 for row in chart.rows for bar in row.bars)
