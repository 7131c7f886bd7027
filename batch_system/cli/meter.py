"""Shows the progress of a command's own work on stderr: as a bar in a terminal, and otherwise as
occasional lines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

    from batch_system.cli.bar import Terminal

BAR_AFTER_SECONDS = 0.5
"""The bar is shown if the work takes longer than this."""
WIDTH_OF_MESSAGES = 70
"""A terminal with fewer columns shows only the numbers, and not the name of the stage."""


@contextmanager
def metered(work: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show the progress of `work` in the block, which gets the function that reports it.

    The function takes the number of bytes that are done, the total (0: not known), and the name of
    the stage. Any thread may call it.
    """
    from batch_system import clock, escaping
    from batch_system.cli import bar

    terminal = bar.terminal_with_cursor(sys.stderr)
    if terminal is None:
        yield _report_in_lines(work)
        return
    started_at = clock.monotonic()
    with _progress(terminal) as progress:
        task = progress.add_task(work, total=None, visible=False, stage="")

        def report(done: int, total: int, stage: str) -> None:
            is_long = clock.monotonic() >= started_at + BAR_AFTER_SECONDS
            stage = escaping.line(stage)
            progress.update(
                task, completed=done, total=max(total, done) or None, stage=stage, visible=is_long
            )

        yield report


def _progress(terminal: Terminal) -> Progress:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    columns = [
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True),
    ]
    if terminal.width >= WIDTH_OF_MESSAGES:
        columns.append(TextColumn("{task.fields[stage]}", markup=False, style="dim"))
    progress = Progress(
        *columns,
        console=terminal,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    )
    terminal.show_below(progress)
    return progress


def _report_in_lines(work: str) -> Callable[[int, int, str], None]:
    from batch_system import clock, console
    from batch_system.cli.bar import LINE_SECONDS

    printed_at = clock.monotonic()

    def report(done: int, total: int, stage: str) -> None:
        nonlocal printed_at
        if clock.monotonic() >= printed_at + LINE_SECONDS:
            printed_at = clock.monotonic()
            console.warn(f"{work}: {size(done)}{f' of {size(total)}' if total else ''}: {stage}")

    return report


def counted(rows: int, tables: int) -> str:
    """The two numbers as text, such as `3 rows of 2 tables`."""
    return " of ".join(
        f"{number:,} {noun}{'' if number == 1 else 's'}"
        for number, noun in ((rows, "row"), (tables, "table"))
    )


def size(number: int | None) -> str | None:
    """A number of bytes as text, such as `4.8 MB`."""
    from rich.filesize import decimal

    return None if number is None else decimal(number)
