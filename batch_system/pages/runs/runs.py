"""The pages about runs: the list with its filters, and one run with its attempts and its log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, get_args
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from batch_system.batch.ledger.states import ACTIVE, IncidentKind
from batch_system.errors import DatabaseError, Forbidden, UnknownRun
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.filter import RunFilter
from batch_system.operations.asking.results import Quarantined, RunDetails, RunSummary
from batch_system.operations.bulks.bulk import STATES as BULK_STATES
from batch_system.operations.bulks.results import BulkAction
from batch_system.operations.incidents.results import Incident
from batch_system.operations.runs import listing, log_window, pace, phases, quarantine, read
from batch_system.operations.runs.log_window import LogWindow
from batch_system.operations.runs.remarks import remarks
from batch_system.operations.runs.results import MOST_RUNS, RunPage
from batch_system.operations.why.text import difference_in_words
from batch_system.pages.charts.waterfall import waterfall
from batch_system.pages.frame.files import list_file
from batch_system.pages.frame.formatting import day
from batch_system.pages.frame.forms import ID
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import LiveViewer, shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.pages.runs.run_filter import (
    WITHIN,
    address,
    chips_of,
    command_of,
    conditions_of,
    given_in,
)
from batch_system.pages.runs.run_lines import (
    Line,
    lines_of,
    parts_of,
    remark_in_words,
    seconds_of,
)
from batch_system.pages.runs.run_tabs import others_of, tabs_of
from batch_system.pages.runs.saved_views import views_in
from batch_system.verbs.incidents import ListIncidents
from batch_system.verbs.runs import ListRuns, ShowBlocker, ShowChain
from batch_system.verbs.why import WhyRun

PAGE = 100
MOST_ACTIVE = 50
"""At most this many runs that go on are listed before the others."""
MOST_OUTAGES = 20
LOG_LINES = 1_000
MOST_DIGITS = 9
MOST_ITEMS = 100
MOST_PARTS = 20
"""At most this many parts of a run are listed on its page. All of them are in the list of runs."""
ORIGINS = ("schedule", "manual", "backfill", "planned", "part")
_ASKED_WHY = ("failed", "skipped")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
NO_LOG = LogWindow(lines=[], numbers=[], older=None, after="0.0", is_end=False, total=0)


async def show_runs(request: Request, viewer: Viewer) -> str:
    """The runs that the query asks for: those that go on, and then the newest.

    `?fold=0` gives each run a line, `?fold=1` folds equal ones, `?unfold=` unfolds one line.
    `?choose=all`: what can be done with all runs of the filter.
    """
    query = request.query_params
    given, after = given_in(query), query.get("after")
    wanted = RunFilter.of(**conditions_of(given, viewer))
    context = viewer.operations.context
    is_folded = query.get("fold", _usual_fold(given)) != "0"
    shows_outages = not wanted.state and after is None and not isinstance(viewer, LiveViewer)
    active, found, over = await _lists(context, wanted, after)
    outages = await _outages(viewer) if shows_outages else []
    going_on = [Line(run, (run,), seconds_of(run, viewer.now)) for run in active.runs]
    lines = lines_of(over, viewer.now, is_folded, query.get("unfold"))
    alone = [line.run for line in (*going_on, *lines) if line.number == 1]
    beside = await remarks(context, alone)
    # A live page gets rows only.
    counts = None if isinstance(viewer, LiveViewer) else await listing.count_states(context, wanted)
    fold, other = ("1", "0") if is_folded else ("0", "1")
    here = {**given, **({"fold": fold} if fold != _usual_fold(given) else {})}
    return await render(
        "runs.html",
        **await shell_of(viewer, "runs", "Runs"),
        parts=parts_of(going_on, lines, outages, viewer),
        number=len(active.runs) + len(over),
        number_of_lines=len(going_on) + len(lines),
        awaits={**active.awaits, **found.awaits},
        remarks={run: remark_in_words(each) for run, each in beside.items()},
        acknowledged={run: by for run, each in beside.items() if (by := each.acknowledged_by)},
        given=given,
        chips=chips_of(given, viewer),
        tabs=tabs_of(given, counts),
        views=views_in(request.cookies, given),
        others=others_of(given, counts) if not (found.runs or found.after or after) else None,
        origins=ORIGINS,
        within=[(each, address(given, within=each, since="", until="")) for each in WITHIN],
        following=urlencode({**here, "after": found.after}) if found.after else None,
        is_first=after is None,
        is_folded=is_folded,
        folding=address(given, fold=other if other != _usual_fold(given) else ""),
        chooses_all=query.get("choose") == "all",
        here_query=urlencode({**here, **({"after": after} if after else {})}),
        query=urlencode(given),
        command=command_of(conditions_of(given, viewer)),
        actions=[
            action for action in get_args(BulkAction) if _may_change(action, given.get("state"))
        ],
    )


async def download_runs(request: Request, viewer: Viewer) -> Response:
    """The runs that the filter finds as `?format=csv` or json, the newest first."""
    conditions = conditions_of(given_in(request.query_params), viewer)
    asked = ListRuns.of(**conditions, limit=MOST_RUNS)
    return await list_file(request, viewer, "runs", RunSummary, asked)


async def _lists(
    context: Context, wanted: RunFilter, after: str | None
) -> tuple[RunPage, RunPage, list[RunSummary]]:
    """The runs that go on, which stand first, the page of runs that are wanted, and those of its
    runs that stand after the former.
    """
    is_mixed = not wanted.state
    active = RunPage(runs=[], after=None)
    if is_mixed and after is None:  # before the others, so that a run that ends is in one of both
        of_active = wanted.model_copy(update={"state": list(ACTIVE)})
        active = await listing.list_runs(context, of_active, MOST_ACTIVE)
    found = await listing.list_runs(context, wanted, PAGE, after)
    listed = {run.id for run in active.runs}
    over = [
        run for run in found.runs if run.id not in listed and not (is_mixed and run.state in ACTIVE)
    ]
    return active, found, over


def _usual_fold(given: Mapping[str, str]) -> str:
    """Equal runs are folded, but for the parts of a run, which a person wants to see one by one."""
    return "0" if "parent" in given else "1"


async def _outages(viewer: Viewer) -> list[Incident]:
    """The newest times in which no service ran."""
    asked = ListIncidents(state="all", kind=IncidentKind.DOWN, limit=MOST_OUTAGES)
    found = (await viewer.operations(asked)).incidents
    return list({each.subject: each for each in found}.values())


def _may_change(action: str, state: str | None) -> bool:
    """Whether the action changes runs that the list is filtered by."""
    return (
        state is None or (state == "active" and action == "cancel") or state in BULK_STATES[action]
    )


async def show_run(request: Request, viewer: Viewer) -> str:
    """One run. `?level=` and `?text=` leave lines of the log out; `?to=` the number of the last
    line that is shown.
    """
    run = await _run(request.path_params["run"], viewer)
    waiting = (
        await viewer.operations(ShowBlocker(run=run.id))
        if run.state in ACTIVE and run.state != "running"
        else None
    )
    story = await phases.story(viewer.operations.context, run.id)
    items = await _quarantined(viewer, run.id)
    found = await viewer.operations(WhyRun(run=run.id)) if run.state in _ASKED_WHY else None
    return await render(
        "run.html",
        **await shell_of(viewer, "runs", f"{run.task} · Run"),
        run=run,
        **await _log(request, viewer, run),
        waiting=waiting,
        why=found,
        differences=[difference_in_words(each) for each in found.comparison.differences]
        if found is not None and found.comparison is not None
        else [],
        chain=await viewer.operations(ShowChain(run=run.id)),
        story=story,
        fall=waterfall(story, viewer.zone),
        items=items,
        left=sum(1 for each in items or () if each.redriven_by is None),
        most_items=MOST_ITEMS,
        most_parts=MOST_PARTS,
        is_active=run.state in ACTIVE,
        seconds=seconds_of(run, viewer.now),
        delay=_delay(run),
        wait=(run.started_at - run.created_at).total_seconds()
        if run.started_at is not None
        else None,
        pace=await pace.pace(viewer.operations.context, run),
        share=_share(run.count, run.total),
        before=_share(run.count_before, run.total),
        error=run.attempts[-1].error
        if run.attempts and run.state in ("failed", "retrying")
        else None,
    )


async def _run(given: str, viewer: Viewer) -> RunDetails:
    """The run without its log, which is read separately. Raises UnknownRun, which says whether the
    run was probably deleted.
    """
    try:
        return await read.show(viewer.operations.context, given, 0)
    except UnknownRun:
        if ID.fullmatch(given) is None:
            raise
    days = viewer.operations.context.settings.KEEP_RUNS_DAYS
    words = f"there is no run with the id {given}"
    # An id of version 7 begins with the time of its making.
    made = int(given[:8] + given[9:13], 16) / 1_000
    if given[14] == "7" and 0 < made < (viewer.now - timedelta(days=days)).timestamp():
        at = day(datetime.fromtimestamp(made, UTC), viewer.zone, viewer.now)
        words += f": it was made on {at}, and runs that have ended are deleted after {days} days"
    raise UnknownRun(words)


async def _log(request: Request, viewer: Viewer, run: RunDetails) -> dict[str, Any]:
    """The lines of the log that are shown, and the filter."""
    if isinstance(viewer, LiveViewer):  # its lines come with the stream
        return {
            "log": NO_LOG,
            "log_words": "",
            "older": None,
            "newest": "",
            "level": "",
            "levels": LEVELS,
            "text": "",
        }
    level = request.query_params.get("level", "DEBUG")
    text = request.query_params.get("text", "").strip()[:200]
    level = level if level in LEVELS else "DEBUG"
    given = request.query_params.get("to", "")
    to = int(given) if given.isdecimal() and len(given) <= MOST_DIGITS else None
    words = ""
    try:
        log = await log_window.window(
            viewer.operations.context, run.id, to, LOG_LINES, level, text or None
        )
    except Forbidden as refused:
        log, words = NO_LOG, refused.message
    kept = {
        name: value
        for name, value in (("level", level if level != "DEBUG" else ""), ("text", text))
        if value
    }
    older = urlencode({**kept, "to": log.older}) if log.older else None
    shown = {"log": log, "log_words": words, "older": older, "newest": urlencode(kept)}
    return {**shown, "level": level, "levels": LEVELS, "text": text}


async def _quarantined(viewer: Viewer, run: str) -> Sequence[Quarantined] | None:
    """The items that the run has set aside; None if the database of the application can't be
    read.
    """
    try:
        return await quarantine.list_items(viewer.operations.context, run, MOST_ITEMS + 1)
    except DatabaseError:
        return None


def _share(count: int | None, total: int | None) -> float | None:
    """A part of the total, 1.0 at most; None if it is not known. An author may have counted
    wrongly.
    """
    return min(1.0, count / total) if count is not None and total else None


def _delay(run: RunDetails) -> float | None:
    """How long after its slot the run began; None if that is not known, or if it was caught up on
    purpose.
    """
    if run.slot is None or run.started_at is None or run.origin != "schedule":
        return None
    late = run.started_at - run.slot
    return late.total_seconds() if late >= timedelta() else None
