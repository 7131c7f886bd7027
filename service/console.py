"""How lists and lines look: tables and colours in a terminal, plain columns and text when piped, or JSON.

All that a command prints is printed here, so that nothing from a file, a task or an author's error acts in a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.cells import cell_len

from service.escaping import line, lines, to_json

Row = dict[str, Any]

LAST = 16
"""The last column is folded to fit the terminal, but not below so many characters."""

STYLES = {
    "debug": "dim",
    "warning": "yellow",
    "error": "red",
    "critical": "bold red",
    "note": "cyan",
    "heading": "bold",
}


INDENT = "    "
"""Stands before the lines of a text that has several: what begins a line is ours."""


def say(text: str = "", flush: bool = False) -> None:
    """Print a line on stdout, whatever is in it."""
    print(line(text), flush=flush)


def warn(text: str, end: str = "\n") -> None:
    """Print a line on stderr, whatever is in it."""
    print(line(text), end=end, file=sys.stderr, flush=True)


def write(made: str, end: str = "\n", flush: bool = False) -> None:
    """Print what was made by `paint`, `line`, `message` or `to_json`, as it is."""
    print(made, end=end, flush=flush)


def show(rows: Sequence[Row], columns: Sequence[str], as_json: bool) -> None:
    """Print rows. JSON has all of their keys; a table has `columns`, without those that are empty throughout."""
    if as_json:
        show_json(list(rows))
        return
    used = [c for c in columns if any(row[c] not in (None, "", False) for row in rows)] or list(columns)
    cells = [[_text(row[c]) for c in used] for row in rows]
    if sys.stdout.isatty():
        _table(used, cells)
    else:
        _plain(used, cells)


def show_json(value: Any) -> None:
    """One line of JSON; instants as ISO 8601."""
    write(to_json(value, _json))


def show_values(values: Mapping[str, Any]) -> None:
    """A line for each value that there is, after its name."""
    used = {name: value for name, value in values.items() if value not in (None, "", [])}
    width = max(map(len, used), default=0)
    for name, value in used.items():
        first, *more = value if isinstance(value, list) else [value]
        say(f"{name:<{width}}  {_text(first)}")
        for other in more:
            say(f"{'':<{width}}  {_text(other)}")


def heading(text: str) -> None:
    say()
    write(paint(text, "heading"))


def paint(text: str, kind: str) -> str:
    """Coloured in a terminal that has colours; `kind` is a level of a log line, or another key of STYLES."""
    text = line(text)
    if kind not in STYLES or not sys.stdout.isatty():
        return text
    from rich.color import ColorSystem
    from rich.console import Console
    from rich.style import Style

    if (console := Console()).no_color or not console.color_system:
        return text
    return Style.parse(STYLES[kind]).render(text, color_system=ColorSystem.STANDARD)


def message(text: str) -> str:
    """For `write`: the lines of somebody's text, the later ones indented."""
    return lines(text, INDENT)


def duration(start: datetime | None, end: datetime | None) -> str:
    return f" in {(end - start).total_seconds():.2f} s" if start and end else ""


def _table(columns: Sequence[str], cells: list[list[str]]) -> None:
    """Only the last column is folded; where the others need more than the terminal has, lines run on."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns[:-1]:
        table.add_column(column, no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    *widths, last = _widths(columns, cells)
    needed = sum(widths) + 2 * len(widths) + min(last, LAST)
    Console(width=max(Console().width, needed)).print(table)


def _plain(columns: Sequence[str], cells: list[list[str]]) -> None:
    widths = _widths(columns, cells)
    for row in (columns, *cells):
        padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
        say("  ".join(padded).rstrip())


def _widths(columns: Sequence[str], cells: list[list[str]]) -> list[int]:
    return [max(map(cell_len, column)) for column in zip(columns, *cells, strict=True)]


def _json(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _text(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, datetime):
        return value.isoformat(" ", "seconds").replace("+00:00", "Z")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return line(str(value))
