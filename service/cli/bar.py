"""How far a run is: a bar in a terminal; elsewhere a line when something has changed."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any, Self, TextIO, cast

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from service import clock, console, escaping
from service.cli import progress
from service.cli.progress import Row

LINE_SECONDS = 10.0
"""A line about the progress of a run comes no more often."""
DRAWN_A_SECOND = 8
NARROWEST, WIDEST = 10, 40
"""Columns of the bar beside the words. Where there is less room, it has a line of its own."""
STATES = {"running": "cyan", "retrying": "yellow", "interrupted": "magenta"}

Tell = Callable[[Row, str], None]


def display(stream: TextIO, tell: Tell, states: bool = True, after: float = 0.0) -> Bar | Lines:
    """A bar on `stream` where that is a terminal that can move its cursor, and lines given to `tell` elsewhere.

    `states`: whether there are lines about other states than `running`. `after`: seconds until the bar is drawn.
    """
    terminal = moving_terminal(stream)
    return Bar(terminal, after) if terminal is not None else Lines(tell, states)


def moving_terminal(stream: TextIO) -> Console | None:
    """`stream`, where that is a terminal that can move its cursor and show the characters of a bar."""
    if not stream.isatty():
        return None
    terminal = Console(file=stream)
    return terminal if terminal.is_interactive and terminal.encoding.startswith("utf") else None


class Lines:
    """Where nothing can move: what has changed, as a line. The first one comes at once, if `states` count."""

    log_stream: TextIO | None = None

    def __init__(self, tell: Tell, states: bool = True) -> None:
        self.run: Row | None = None
        self._tell = tell
        self._states = states
        self._told: tuple[Any, ...] = (None, None, None)
        self._told_at = clock.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def write(self, made: str) -> None:
        console.write(made, flush=True)

    def see(self, run: Row) -> None:
        """`run`: its row, as `following.looks` has it."""
        is_other = self._states and (self.run is None or run["state"] != self.run["state"])
        self.run = run
        said = run["count"], run["total"], run["message"]
        is_news = said != self._told and run["state"] == "running"
        if is_other or (is_news and clock.monotonic() >= self._told_at + LINE_SECONDS):
            self._told, self._told_at = said, clock.monotonic()
            self._tell(run, _line(run))


def _line(run: Row) -> str:
    numbers = progress.words(run, run["now"]) if run["state"] == "running" else []
    told = run["message"] if run["state"] == "running" else run["reason"]
    more = [", ".join(numbers), told]
    return escaping.line(": ".join([f"{run['task']} {run['state']}", *filter(None, more)]))


class Bar(Progress):
    """A bar that a thread draws, so that a terminal that hangs holds up only that thread."""

    def __init__(self, terminal: Console, after: float = 0.0) -> None:
        self.run: Row | None = None
        self.log_stream: TextIO | None = cast(TextIO, _Above(self))
        self._seen_at = 0.0
        self._from = clock.monotonic() + after
        self._takes_stdout = sys.stdout.isatty()
        super().__init__(
            console=terminal,
            refresh_per_second=DRAWN_A_SECOND,
            transient=True,
            redirect_stdout=self._takes_stdout,
            redirect_stderr=sys.stderr.isatty(),
        )

    def write(self, made: str) -> None:
        """On stdout; above the bar where that is the terminal too."""
        if self._takes_stdout:
            self.above(made)
        else:
            console.write(made, flush=True)

    def above(self, made: str) -> None:
        self.console.print(Text.from_ansi(made), soft_wrap=True)

    def see(self, run: Row) -> None:
        """`run`: its row, as `run_log.looks` has it."""
        self.run, self._seen_at = run, clock.monotonic()

    def get_renderables(self) -> Iterator[RenderableType]:
        if self.run is not None and clock.monotonic() >= self._from:
            now = self.run["now"] + timedelta(seconds=clock.monotonic() - self._seen_at)
            yield from view(self.run, now, self.console.width)


class _Above(io.TextIOBase):
    """For lines of a log. It has no file descriptor by which they could be written past the bar."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._bar.above(text.removesuffix("\n"))
        return len(text)


def view(run: Row, now: datetime, width: int) -> Iterator[RenderableType]:
    """A run at an instant: one line where `width` has room for it, and more lines elsewhere; its message below."""
    task, state = escaping.line(run["task"]), escaping.line(run["state"])
    head = Text.assemble((task, "bold"), " ", (state, STATES.get(state, "")), no_wrap=True, overflow="ellipsis")
    words = progress.words(run, now) + _times(run, now)
    tail = Text("  ".join(words))
    bar = _bar(run)
    line = Table.grid(padding=(0, 2))
    room = width - head.cell_len - tail.cell_len - 2 - 2 * bool(tail)
    if room >= NARROWEST:
        if bar is not None:
            bar.width = min(room, WIDEST)
        line.add_row(*[part for part in (head, bar, tail) if part])
        yield line
    else:
        yield head
        if bar is not None:
            line.add_row(bar)
            yield line
        yield Columns(words, padding=(0, 2))
    if note := escaping.line((run["message"] if run["state"] == "running" else run["reason"]) or ""):
        yield Text(note, style="dim", no_wrap=True, overflow="ellipsis")


def _bar(run: Row) -> ProgressBar | None:
    """Without a total it only moves. A run that waits, and has no total, has none."""
    if run["count"] is not None and run["total"]:
        return ProgressBar(total=run["total"], completed=run["count"])
    return ProgressBar(total=None, pulse=True) if run["state"] == "running" else None


def _times(run: Row, now: datetime) -> list[str]:
    """When the next attempt begins, or how long this one has run where nobody knows how much longer it will."""
    if run["state"] == "retrying":
        return [f"next try in {progress.duration((run['due_at'] - now).total_seconds())}"]
    if run["state"] == "running" and run["eta"] is None:
        return [f"{progress.duration((now - run['attempt_started_at']).total_seconds())} so far"]
    return []
