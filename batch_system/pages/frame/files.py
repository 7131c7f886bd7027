"""What a page shows, as a file: for spreadsheets as CSV, and for programs as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from batch_system.escaping import cell

TYPES = {"csv": "text/csv; charset=utf-8", "json": "application/json; charset=utf-8"}
"""The formats, and the media type of each."""


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
