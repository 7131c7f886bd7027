"""Search: the page of what was found for some words, whose groups the command box shows too."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request

from batch_system.batch.ledger.run_ids import MOST_SEARCHED
from batch_system.operations.asking.results import RunSummary
from batch_system.operations.runs import finding
from batch_system.operations.runs.finding import MOST_IDS
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import LiveViewer, shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.pages.runs.run_filter import words_of
from batch_system.pages.search.groups import Groups, groups_of, wanted_of
from batch_system.pages.search.meaning import meaning_of

MOST_RUNS = 10


async def show_search(request: Request, viewer: Viewer) -> str:
    """What is found for `?q=`. The command box asks for the block of the groups alone."""
    meaning = meaning_of(request.query_params.get("q", ""))
    is_box = isinstance(viewer, LiveViewer)
    groups = await groups_of(meaning, viewer, MOST_IDS if is_box else MOST_SEARCHED)
    return await render(
        "search.html",
        **await shell_of(
            viewer, "", f"Search for {meaning.text}" if meaning.text else "Find, filter or do"
        ),
        wanted=meaning.text,
        groups=groups,
        runs=[] if is_box else await _runs_like_this(groups, viewer),
        filter=words_of(groups.filter, viewer),
    )


async def _runs_like_this(groups: Groups, viewer: Viewer) -> Sequence[RunSummary]:
    """The newest runs of the first filter."""
    if not groups.has_runs:
        return []
    async with viewer.operations.context.databases.reading() as connection:
        if connection is None:
            return []
        wanted = wanted_of(groups.filter, viewer)
        return await finding.newest_of(connection, viewer.operations.context, wanted, MOST_RUNS)
