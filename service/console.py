"""How lists look: a table in a terminal, plain columns when piped, or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def show(rows: Sequence[Row], columns: Sequence[str], as_json: bool) -> None:
    """Print rows. JSON has all of their keys; a table has `columns`, without those that are empty throughout."""
    if as_json:
        print(json.dumps([{key: _json(value) for key, value in row.items()} for row in rows], ensure_ascii=False))
        return
    used = [c for c in columns if any(row[c] not in (None, "", False) for row in rows)] or list(columns)
    cells = [[_text(row[c]) for c in used] for row in rows]
    if sys.stdout.isatty():
        _table(used, cells)
    else:
        _plain(used, cells)


def duration(start: datetime | None, end: datetime | None) -> str:
    return f" in {(end - start).total_seconds():.2f} s" if start and end else ""


def _table(columns: Sequence[str], cells: list[list[str]]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in cells:
        table.add_row(*row)
    Console().print(table)


def _plain(columns: Sequence[str], cells: list[list[str]]) -> None:
    lines = [list(columns), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _json(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _text(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).replace("\n", " ")
