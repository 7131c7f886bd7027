"""Shows the progress of a run: as a bar in a terminal, and otherwise as a line when something has
changed.
"""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any, Self, TextIO, cast

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batch_system import clock, console, escaping
from batch_system.cli import progress
from batch_system.cli.progress import Row

LINE_SECONDS = 10.0
"""The shortest time between two lines about the progress of a run."""
DRAWS_PER_SECOND = 8
NARROWEST, WIDEST = 10, 40
"""The limits of the bar's width, in columns, beside its text. If there is less room, the bar has a
line of its own.
"""
STATES = {"waiting": "blue", "running": "cyan", "retrying": "yellow", "interrupted": "magenta"}

PrintLine = Callable[[Row, str], None]
"""A function that prints a line of text about the run in this row."""


def display(
    stream: TextIO, print_line: PrintLine, states: bool = True, after: float = 0.0
) -> Bar | Lines:
    """A bar if `stream` is a terminal that can show one. Otherwise lines, which are printed by
    `print_line`.

    `states`: whether lines are printed about other states than `running`. `after`: seconds until
    the bar is drawn.
    """
    terminal = terminal_with_cursor(stream)
    return Bar(terminal, after) if terminal is not None else Lines(print_line, states)


class Terminal(Console):
    """A terminal that shows a progress display below what is printed.

    Whoever prints first erases the display, by the number of lines that it knows it to have, and
    then draws it again. So only one thread may do that at a time. The lock is the one that the
    display uses itself: with two locks, two threads could wait for each other.
    """

    lock: threading.RLock | None = None

    def __enter__(self) -> Self:
        if self.lock is not None:
            self.lock.acquire()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            super().__exit__(*error)
        finally:
            if self.lock is not None:
                self.lock.release()

    def show_below(self, display: Progress) -> None:
        """Show this display, which must not have started yet, below what is printed."""
        self.lock = display.live._lock


def terminal_with_cursor(stream: TextIO) -> Terminal | None:
    """The terminal of `stream`. None if it is not a terminal that can move its cursor and show the
    characters of a bar.
    """
    if not stream.isatty():
        return None
    terminal = Terminal(file=stream)
    return terminal if terminal.is_interactive and terminal.encoding.startswith("utf") else None


class Lines:
    """Prints a line when a run has changed. With `states`, the first line is printed at once."""

    log_stream: TextIO | None = None

    def __init__(self, print_line: PrintLine, states: bool = True) -> None:
        self.run: Row | None = None
        self._print_line = print_line
        self._states = states
        self._printed: tuple[Any, ...] = (None, None, None)
        self._printed_at = clock.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def write(self, text: str) -> None:
        console.write(text, flush=True)

    def update_run(self, run: Row) -> None:
        """Print a line if the run has changed since the last one."""
        has_new_state = self._states and (self.run is None or run["state"] != self.run["state"])
        self.run = run
        values = run["count"], run["total"], run["message"]
        has_progress = values != self._printed and run["state"] == "running"
        if has_new_state or (has_progress and clock.monotonic() >= self._printed_at + LINE_SECONDS):
            self._printed = values
            self._printed_at = clock.monotonic()
            self._print_line(run, _line(run))


def _line(run: Row) -> str:
    numbers = progress.words(run, run["now"]) if run["state"] == "running" else []
    explanation = run["message"] if run["state"] == "running" else run["reason"]
    parts = [", ".join(numbers), explanation]
    return escaping.line(": ".join([f"{run['task']} {run['state']}", *filter(None, parts)]))


class Bar(Progress):
    """A bar that is drawn by a thread, so that a terminal that hangs holds up only that thread."""

    def __init__(self, terminal: Terminal, after: float = 0.0) -> None:
        self.run: Row | None = None
        self.log_stream: TextIO | None = cast(TextIO, _LogStream(self))
        self._updated_at = 0.0
        self._drawn_from = clock.monotonic() + after
        self._has_stdout = sys.stdout.isatty()
        super().__init__(
            console=terminal,
            refresh_per_second=DRAWS_PER_SECOND,
            transient=True,
            redirect_stdout=self._has_stdout,
            redirect_stderr=sys.stderr.isatty(),
        )
        terminal.show_below(self)

    def write(self, text: str) -> None:
        """Write a text to stdout. If stdout is the terminal of the bar, the text is written above
        the bar.
        """
        if self._has_stdout:
            self.write_above(text)
        else:
            console.write(text, flush=True)

    def write_above(self, text: str) -> None:
        self.console.print(Text.from_ansi(text), soft_wrap=True)

    def update_run(self, run: Row) -> None:
        """Show this row of the run from now on."""
        self.run = run
        self._updated_at = clock.monotonic()

    def get_renderables(self) -> Iterator[RenderableType]:
        if self.run is not None and clock.monotonic() >= self._drawn_from:
            now = self.run["now"] + timedelta(seconds=clock.monotonic() - self._updated_at)
            yield from view(self.run, now, self.console.width)


class _LogStream(io.TextIOBase):
    """A stream that writes log lines above the bar. It has no file descriptor by which the bar
    could be overwritten.
    """

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._bar.write_above(text.removesuffix("\n"))
        return len(text)


def view(run: Row, now: datetime, width: int) -> Iterator[RenderableType]:
    """The display of a run: one line, or several lines if `width` has too little room. The message
    is below them.
    """
    task, state = escaping.line(run["task"]), escaping.line(run["state"])
    name = Text.assemble(
        (task, "bold"), " ", (state, STATES.get(state, "")), no_wrap=True, overflow="ellipsis"
    )
    words = progress.words(run, now) + _times(run, now)
    numbers = Text("  ".join(words))
    bar = _bar(run)
    line = Table.grid(padding=(0, 2))
    bar_width = width - name.cell_len - numbers.cell_len - 2 - 2 * bool(numbers)
    if bar_width >= NARROWEST:
        if bar is not None:
            bar.width = min(bar_width, WIDEST)
        line.add_row(*[part for part in (name, bar, numbers) if part])
        yield line
    else:
        yield name
        if bar is not None:
            line.add_row(bar)
            yield line
        yield Columns(words, padding=(0, 2))
    if note := escaping.line(
        (run["message"] if run["state"] == "running" else run["reason"]) or ""
    ):
        yield Text(note, style="dim", no_wrap=True, overflow="ellipsis")


def _bar(run: Row) -> ProgressBar | None:
    """A bar with the completed share. Without a total: a pulsing bar for a running run, and None
    for others.
    """
    if run["count"] is not None and run["total"]:
        return ProgressBar(total=run["total"], completed=run["count"])
    return ProgressBar(total=None, pulse=True) if run["state"] == "running" else None


def _times(run: Row, now: datetime) -> list[str]:
    """The time until the next attempt, or, if the remaining time is unknown, how long this attempt
    has run.
    """
    if run["state"] == "retrying":
        return [f"next attempt in {progress.duration((run['due_at'] - now).total_seconds())}"]
    if run["state"] == "running" and run["eta"] is None:
        return [f"{progress.duration((now - run['attempt_started_at']).total_seconds())} so far"]
    return []
