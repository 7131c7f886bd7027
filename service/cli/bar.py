"""Following one run: a bar that moves, in a terminal; else a line now and then."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self, TextIO, cast

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.text import Text

from service import clock, console, escaping
from service.cli import progress
from service.cli.progress import Row

LINE_SECONDS = 10.0
"""Not more often does a line say how far the run is."""
DRAWN_A_SECOND = 8
NARROWEST, WIDEST = 10, 40
"""The bar beside the words, in columns; where less is left, it has a line of its own."""
STATES = {"running": "cyan", "retrying": "yellow", "interrupted": "magenta"}


Tell = Callable[[Row, str], None]


def display(stream: TextIO, tell: Tell, states: bool = True, after: float = 0.0) -> Bar | Lines:
    """A bar on `stream` where that is a terminal that can show one, `after` so many seconds; else lines for `tell`.

    `states`: whether there are lines about more than the progress of what is running.
    """
    if stream.isatty():
        terminal = Console(file=stream)
        if terminal.is_interactive and terminal.encoding.startswith("utf"):
            return Bar(terminal, after)
    return Lines(tell, states)


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


class Bar:
    """Drawn by a thread of its own, so that a terminal that hangs holds up nobody but that."""

    def __init__(self, terminal: Console, after: float = 0.0) -> None:
        self.run: Row | None = None
        self.log_stream: TextIO | None = cast(TextIO, _Above(self))
        self._terminal = terminal
        self._seen_at = 0.0
        self._from = clock.monotonic() + after
        self._takes_stdout = sys.stdout.isatty()
        self._live = Live(
            console=terminal,
            refresh_per_second=DRAWN_A_SECOND,
            transient=True,
            redirect_stdout=self._takes_stdout,
            redirect_stderr=sys.stderr.isatty(),
            get_renderable=self._view,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """The bar is gone, and the cursor is back."""
        self._live.stop()

    def write(self, made: str) -> None:
        """On stdout; above the bar where that is the terminal too."""
        if self._takes_stdout:
            self.above(made)
        else:
            console.write(made, flush=True)

    def above(self, made: str) -> None:
        self._terminal.print(Text.from_ansi(made), soft_wrap=True)

    def see(self, run: Row) -> None:
        """`run`: its row, as `following.looks` has it."""
        self.run, self._seen_at = run, clock.monotonic()

    def _view(self) -> RenderableType:
        if self.run is None or clock.monotonic() < self._from:
            return ""
        return View(self.run, self.run["now"] + timedelta(seconds=clock.monotonic() - self._seen_at))


class _Above(io.TextIOBase):
    """For lines of a log. It has no file descriptor that they could be written to past the bar."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._bar.above(text.removesuffix("\n"))
        return len(text)


class View:
    """A run at an instant, as wide as the terminal is: one line, or more where it is narrow; its message below."""

    def __init__(self, run: Row, now: datetime) -> None:
        self._run = run
        task, state = escaping.line(run["task"]), escaping.line(run["state"])
        self._head = Text.assemble((task, "bold"), " ", (state, STATES.get(state, "")), end="")
        self._words = progress.words(run, now) + _times(run, now)
        self._note = escaping.line((run["message"] if run["state"] == "running" else run["reason"]) or "")

    def __rich_console__(self, terminal: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        tail = "  ".join(self._words)
        room = width - cell_len(self._head.plain) - cell_len(tail) - 2 - 2 * bool(tail)
        if room >= NARROWEST:
            yield from self._beside(terminal, options, min(room, WIDEST), tail)
        else:
            yield from self._below(terminal, options, width)
        if self._note:
            yield Segment.line()
            yield _cut(self._note, width, "dim")

    def _beside(self, terminal: Console, options: ConsoleOptions, size: int, tail: str) -> RenderResult:
        yield self._head
        if (bar := self._bar(size)) is not None:
            yield Segment("  ")
            yield from _drawn(bar, terminal, options, size)
        yield Segment(f"  {tail}" if tail else "")

    def _below(self, terminal: Console, options: ConsoleOptions, width: int) -> RenderResult:
        self._head.truncate(width, overflow="ellipsis")
        yield self._head
        if (bar := self._bar(width)) is not None:
            yield Segment.line()
            yield from _drawn(bar, terminal, options, width)
        for line in _folded(self._words, width):
            yield Segment.line()
            yield _cut(line, width)

    def _bar(self, size: int) -> ProgressBar | None:
        """Without a total it only moves. What waits, and has no total, has none."""
        count, total = self._run["count"], self._run["total"]
        if count is not None and total:
            return ProgressBar(total=total, completed=count, width=size)
        if self._run["state"] == "running":
            return ProgressBar(total=None, pulse=True, width=size)
        return None


def _drawn(bar: ProgressBar, terminal: Console, options: ConsoleOptions, size: int) -> RenderResult:
    """What is left of it has a colour; where there is none, another line."""
    drawn = list(terminal.render(bar, options.update(width=size)))
    yield from drawn
    yield Segment("─" * (size - Segment.get_line_length(drawn)))


def _times(run: Row, now: datetime) -> list[str]:
    """How long it goes on, where nobody knows for how long yet; or when it goes on."""
    if run["state"] == "retrying":
        return [f"next try in {progress.duration((run['due_at'] - now).total_seconds())}"]
    if run["state"] == "running" and run["eta"] is None:
        return [f"{progress.duration((now - run['attempt_started_at']).total_seconds())} so far"]
    return []


def _folded(words: list[str], width: int) -> Iterator[str]:
    """As many on a line as fit."""
    line = ""
    for word in words:
        longer = f"{line}  {word}" if line else word
        if line and cell_len(longer) > width:
            yield line
            longer = word
        line = longer
    if line:
        yield line


def _cut(text: str, width: int, style: str = "") -> Text:
    cut = Text(text, style=style, end="")
    cut.truncate(width, overflow="ellipsis")
    return cut
