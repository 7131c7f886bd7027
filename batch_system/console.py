"""Prints the output of commands: tables and colours in a terminal, plain columns and text in a
pipe, or JSON.

Commands print only through this module, which escapes control characters from a file, a task or an
author's error.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len

from batch_system import words
from batch_system.escaping import line, lines, to_json

if TYPE_CHECKING:
    from rich.console import OverflowMethod

LAST = 16
"""The last column of a table is folded to fit the terminal, but it is at least this many characters
wide.
"""

STYLES = {
    "debug": "dim",
    "warning": "yellow",
    "error": "red",
    "critical": "bold red",
    "note": "cyan",
    "heading": "bold",
    **words.STYLES,
}
"""The styles of log levels, headings and states."""
STATE = "state"
"""The column whose cells are coloured by their state."""

INDENT = "    "
"""The later lines of a text are indented by this, so that they can't look like a line of the
command.
"""


def say(text: str = "", flush: bool = False) -> None:
    """Print one line on stdout, escaped."""
    write(line(text), flush=flush)


def warn(text: str, end: str = "\n") -> None:
    """Print one line on stderr, escaped, after what was printed on stdout."""
    sys.stdout.flush()
    write(line(text), end=end, flush=True, to_stderr=True)


def write(text: str, end: str = "\n", flush: bool = False, to_stderr: bool = False) -> None:
    """Print text as it is. It must come from `paint`, `line`, `message` or `to_json`, which escape
    it.

    The text and its end are one write, also where Python buffers nothing. Otherwise a line of the
    log may come in between.
    """
    print(f"{text}{end}", end="", flush=flush, file=sys.stderr if to_stderr else sys.stdout)


def show(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    """Print rows: as JSON with all of their keys, or as a table of those `columns` that have a
    value in at least one row.
    """
    if as_json:
        show_json(list(rows))
        return
    used = [c for c in columns if any(row[c] not in (None, "", False) for row in rows)] or list(
        columns
    )
    cells = [[_text(row[c]) for c in used] for row in rows]
    if not sys.stdout.isatty():
        _plain(used, cells)
        return
    from rich.console import Console

    *widths, last = _widths(used, cells)
    needed = sum(widths) + 2 * len(widths) + min(last, LAST)
    _table(used, cells, max(Console().width, needed))


def show_fitted(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], first_left_out: Sequence[str]
) -> None:
    """Print rows as a table of these columns, including empty ones.

    No line is wider than the terminal: columns are left out, in the order of `first_left_out`,
    until LAST characters of the last column fit, and the last column is cut. A pipe gets all
    columns, uncut.
    """
    cells = [[_text(row[column]) for column in columns] for row in rows]
    if not sys.stdout.isatty():
        _plain(columns, cells)
        return
    from rich.console import Console

    width, widths = Console().width, dict(zip(columns, _widths(columns, cells), strict=True))
    shown = list(columns)
    for column in first_left_out:
        *firsts, last = (widths[each] for each in shown)
        if sum(firsts) + 2 * len(firsts) + min(last, LAST) <= width:
            break
        shown.remove(column)
    places = [columns.index(column) for column in shown]
    _table(shown, [[row[place] for place in places] for row in cells], width, is_cut=True)


def show_json(value: Any) -> None:
    """Print a value as one line of JSON, with datetimes in ISO 8601, and models as in the HTTP
    API.
    """
    write(json_of(value))


def json_of(value: Any) -> str:
    """A value as one line of JSON, as `show_json` prints it."""
    return to_json(value, _json)


def show_values(values: Mapping[str, Any]) -> None:
    """Print a line with the name and the value for each value that is not empty. A list gets a line
    for each item.
    """
    used = {name: value for name, value in values.items() if value not in (None, "", [])}
    width = max(map(len, used), default=0)
    for name, value in used.items():
        first, *more = value if isinstance(value, list) else [value]
        say(f"{name:<{width}}  {_text(first)}")
        for other in more:
            say(f"{'':<{width}}  {_text(other)}")


def heading(text: str) -> None:
    """Print an empty line and a heading."""
    say()
    write(paint(text, "heading"))


def paint(text: str, kind: str) -> str:
    """The text, escaped, with the colour of `kind` (a key of STYLES) if stdout is a terminal with
    colours.
    """
    text = line(text)
    if kind not in STYLES or not sys.stdout.isatty() or not _has_colours():
        return text
    from rich.color import ColorSystem
    from rich.style import Style

    return Style.parse(STYLES[kind]).render(text, color_system=ColorSystem.STANDARD)


def _has_colours() -> bool:
    """Whether the terminal of stdout shows colours, and NO_COLOR does not forbid them."""
    from rich.console import Console

    console = Console()
    return not console.no_color and bool(console.color_system)


def message(text: str) -> str:
    """A text of several lines for `write`, escaped, with the later lines indented."""
    return lines(text, INDENT)


def duration(start: datetime | None, end: datetime | None) -> str:
    """The time between two instants in words, or an empty string if one is None."""
    return f" in {(end - start).total_seconds():.2f} s" if start and end else ""


def _table(
    columns: Sequence[str], cells: list[list[str]], width: int, is_cut: bool = False
) -> None:
    """Print a table of this width. The last column gives way to the others: it is folded, or cut if
    `is_cut`.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    *firsts, last = columns
    for column in firsts:
        table.add_column(column, no_wrap=True)
    no_wrap = True if is_cut else None
    overflow: OverflowMethod = "ellipsis" if is_cut else "fold"
    table.add_column(Text(last, no_wrap=no_wrap), overflow=overflow)
    for row in cells:
        table.add_row(
            *(
                Text(cell, STYLES.get(cell, "") if column == STATE else "", no_wrap=no_wrap)
                for column, cell in zip(columns, row, strict=True)
            )
        )
    Console(width=width).print(table)


def _plain(columns: Sequence[str], cells: list[list[str]]) -> None:
    widths = _widths(columns, cells)
    for row in (columns, *cells):
        padded = (
            cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)
        )
        say("  ".join(padded).rstrip())


def _widths(columns: Sequence[str], cells: list[list[str]]) -> list[int]:
    return [max(map(cell_len, column)) for column in zip(columns, *cells, strict=True)]


def _json(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", by_alias=True)
    return value.isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else str(value)


def _text(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, datetime):
        return value.isoformat(" ", "seconds").replace("+00:00", "Z")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return line(str(value))
