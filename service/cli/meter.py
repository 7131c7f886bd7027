"""How far a command's own work is: a bar on stderr in a terminal; elsewhere a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BAR_AFTER_SECONDS = 0.5
WIDTH_OF_MESSAGES = 70
"""A terminal that has fewer columns shows what is going on in numbers only."""


@contextmanager
def metered(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A function to be told bytes, of how many (0: not known), and what is going on; from any thread."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    from service import clock, escaping
    from service.cli import bar

    terminal = bar.moving_terminal(sys.stderr)
    if terminal is None:
        yield _lines(what)
        return
    bar_column = BarColumn(bar_width=None)
    columns = [
        TextColumn("[bold]{task.description}"),
        bar_column,
        DownloadColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True),
    ]
    if terminal.width >= WIDTH_OF_MESSAGES:
        columns.append(TextColumn("{task.fields[message]}", markup=False, style="dim"))
    begun = clock.monotonic()
    with Progress(
        *columns,
        console=terminal,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    ) as shown:
        work = shown.add_task(what, total=None, visible=False, message="")

        def tell(done: int, total: int, message: str) -> None:
            is_long = clock.monotonic() >= begun + BAR_AFTER_SECONDS
            message = escaping.line(message)
            shown.update(work, completed=done, total=max(total, done) or None, message=message, visible=is_long)

        yield tell


def _lines(what: str) -> Callable[[int, int, str], None]:
    from service import clock, console
    from service.cli.bar import LINE_SECONDS

    told_at = clock.monotonic()

    def tell(done: int, total: int, message: str) -> None:
        nonlocal told_at
        if clock.monotonic() >= told_at + LINE_SECONDS:
            told_at = clock.monotonic()
            console.warn(f"{what}: {size(done)}{f' of {size(total)}' if total else ''}: {message}")

    return tell


def counted(rows: int, tables: int) -> str:
    return " of ".join(
        f"{number:,} {what}{'' if number == 1 else 's'}" for number, what in ((rows, "row"), (tables, "table"))
    )


def size(number: int | None) -> str | None:
    """Bytes for people."""
    from rich.filesize import decimal

    return None if number is None else decimal(number)
