"""The runs that a filter of the page finds, as a file."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from batch_system.concurrency.offload import offload
from batch_system.errors import InvalidParameters
from batch_system.operations.asking.results import RunSummary
from batch_system.operations.runs.results import MOST_RUNS, RunPage
from batch_system.pages.frame.files import TYPES, attachment, csv_head, csv_rows
from batch_system.pages.frame.viewer import Viewer
from batch_system.pages.runs.run_filter import conditions_of, given_in
from batch_system.verbs.runs import ListRuns

MOST_PAGES = 50
"""A file has as many pages of the list at most: 10,000 runs."""
COLUMNS = list(RunSummary.model_fields)
REST = "There are more runs than this file has: narrow the filter."


async def download(request: Request, viewer: Viewer) -> Response:
    """The runs as `?format=csv` or json, the newest first, sent a page at a time."""
    kind = request.query_params.get("format", "")
    if kind not in TYPES:
        raise InvalidParameters(f"format: allowed are {', '.join(TYPES)}")
    conditions = conditions_of(given_in(request.query_params), viewer)
    asked = ListRuns.of(**conditions, limit=MOST_RUNS)
    first = await viewer.operations(asked)  # raises errors before anything is sent
    pages = _pages(viewer, asked, first)
    text = _as_csv(pages) if kind == "csv" else _as_json(pages)
    return StreamingResponse(text, media_type=TYPES[kind], headers=attachment(f"runs.{kind}"))


async def _pages(viewer: Viewer, asked: ListRuns, page: RunPage) -> AsyncIterator[RunPage]:
    yield page
    for _ in range(MOST_PAGES - 1):
        if page.after is None:
            return
        page = await viewer.operations(asked.model_copy(update={"after": page.after}))
        yield page


async def _as_csv(pages: AsyncIterator[RunPage]) -> AsyncIterator[str]:
    """Where runs are left out, the last line says so."""
    yield csv_head(COLUMNS)
    after = None
    async for page in pages:
        yield await offload(csv_rows, COLUMNS, _rows(page))
        after = page.after
    if after is not None:
        yield csv_rows(COLUMNS, [{COLUMNS[0]: REST}])


async def _as_json(pages: AsyncIterator[RunPage]) -> AsyncIterator[str]:
    """An object as the API answers it. Where runs are left out, `after` is the cursor of the next
    one.
    """
    yield '{"runs": ['
    after, comma = None, ""
    async for page in pages:
        if rows := await offload(_rows, page):
            yield comma + (await offload(json.dumps, rows))[1:-1]
            comma = ", "
        after = page.after
    yield f'], "after": {json.dumps(after)}}}\n'


def _rows(page: RunPage) -> Sequence[dict[str, Any]]:
    return [run.model_dump(mode="json") for run in page.runs]
