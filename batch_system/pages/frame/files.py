"""What a page shows, as a file: for spreadsheets as CSV, and for programs as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import StreamingResponse

from batch_system.concurrency.offload import offload
from batch_system.errors import InvalidParameters
from batch_system.escaping import cell
from batch_system.pages.frame.viewer import Viewer

TYPES = {"csv": "text/csv; charset=utf-8", "json": "application/json; charset=utf-8"}
"""The formats, and the media type of each."""
MOST_PAGES = 50
"""A file has as many pages of a list at most: 10,000 rows."""
Parts = AsyncIterator[tuple[list[dict[str, Any]], str | None]]
"""The rows of one page after the other, each with the cursor of the next one."""


def attachment(name: str) -> dict[str, str]:
    """The headers with which a browser saves the answer under this name."""
    return {"Content-Disposition": f"attachment; filename={name}"}


def csv_rows(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows of a CSV file. What is no text is JSON in its cell, and a cell without a value is
    empty.
    """
    out = io.StringIO()
    lines = csv.DictWriter(out, columns, lineterminator="\r\n")
    for row in rows:
        lines.writerow(
            {
                name: cell(value if isinstance(value, str) else json.dumps(value))
                for name, value in row.items()
                if value is not None
            }
        )
    return out.getvalue()


def csv_head(columns: Sequence[str]) -> str:
    """The first line of a CSV file, which names its columns."""
    return csv_rows(columns, [{name: name for name in columns}])


async def list_file(
    request: Request,
    viewer: Viewer,
    name: str,
    row: type[BaseModel],
    asked: Any,
    is_wanted: Callable[[Any], bool] = lambda _: True,
) -> StreamingResponse:
    """A list as `?format=csv` or json, sent a page at a time.

    `name`: that of the file, and of the field with the rows, which are a `row` each. `asked`: the
    verb of the list. Raises InvalidParameters for another format, and what the verb raises.
    """
    kind = request.query_params.get("format", "")
    if kind not in TYPES:
        raise InvalidParameters(f"format: allowed are {', '.join(TYPES)}")
    first = await viewer.operations(asked)  # raises errors before anything is sent

    async def parts() -> Parts:
        page = first
        for _ in range(MOST_PAGES):
            rows = [each for each in getattr(page, name) if is_wanted(each)]
            yield await offload(_dumped, rows), page.after
            if page.after is None:
                return
            page = await viewer.operations(asked.model_copy(update={"after": page.after}))

    text = (
        _as_csv(name, list(row.model_fields), parts()) if kind == "csv" else _as_json(name, parts())
    )
    return StreamingResponse(text, media_type=TYPES[kind], headers=attachment(f"{name}.{kind}"))


def rest_of(name: str) -> str:
    """What the last line of a file says that has not all."""
    return f"There are more {name} than this file has: narrow the filter."


async def _as_csv(name: str, columns: Sequence[str], parts: Parts) -> AsyncIterator[str]:
    """Where rows are left out, the last line says so."""
    yield csv_head(columns)
    after = None
    async for rows, following in parts:
        yield await offload(csv_rows, columns, rows)
        after = following
    if after is not None:
        yield csv_rows(columns, [{columns[0]: rest_of(name)}])


async def _as_json(name: str, parts: Parts) -> AsyncIterator[str]:
    """An object as the API answers it. Where rows are left out, `after` is the cursor of the next
    one.
    """
    yield f'{{"{name}": ['
    after, comma = None, ""
    async for rows, following in parts:
        if rows:
            yield comma + (await offload(json.dumps, rows))[1:-1]
            comma = ", "
        after = following
    yield f'], "after": {json.dumps(after)}}}\n'


def _dumped(rows: Iterable[BaseModel]) -> list[dict[str, Any]]:
    return [row.model_dump(mode="json") for row in rows]
