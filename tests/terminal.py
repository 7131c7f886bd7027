"""A terminal in which a command runs, and what a person sees there."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.processes import NOTHING, environment

ESCAPE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])")
ROWS = 40


class Screen:
    """As much of a terminal as our bar asks for: lines that wrap and scroll, the cursor up, erase a
    line, hide.
    """

    def __init__(self, columns: int) -> None:
        self.has_cursor = True
        self._columns = columns
        self._lines = [""]
        self._x, self._y = 0, 0

    @property
    def lines(self) -> list[str]:
        """The lines that have scrolled away too."""
        return [line.rstrip() for line in self._lines]

    def feed(self, text: str) -> None:
        at = 0
        while at < len(text):
            if (escape := ESCAPE.match(text, at)) is not None:
                self._obey(escape[2], escape[1])
                at = escape.end()
                continue
            self._put(text[at])
            at += 1

    def _obey(self, command: str, given: str) -> None:
        if command == "A":
            self._y -= int(given or 1)
            assert self._y >= max(0, len(self._lines) - ROWS), "the cursor goes above the screen"
        elif (command, given) == ("K", "2"):
            self._lines[self._y] = ""
        elif (command, given) in (("h", "?25"), ("l", "?25")):
            self.has_cursor = command == "h"
        else:
            assert command == "m", f"ESC [ {given} {command}"

    def _put(self, char: str) -> None:
        if char == "\r":
            self._x = 0
        elif char == "\n":
            self._y += 1
            if self._y == len(self._lines):
                self._lines.append("")
        else:
            if self._x == self._columns:
                self._put("\r")
                self._put("\n")
            line = self._lines[self._y].ljust(self._x)
            self._lines[self._y] = line[: self._x] + char + line[self._x + 1 :]
            self._x += 1


class Terminal:
    """`raw` is all that was written to it; `screen` what it shows now; `code` the exit code, at the
    end.
    """

    def __init__(self, process: subprocess.Popen[bytes], ours: int, columns: int) -> None:
        self.process = process
        self.screen = Screen(columns)
        self.raw = ""
        self._ours = ours
        self._rest = b""

    def until(self, condition: Callable[[list[str]], object], seconds: float = 60.0) -> list[str]:
        """Read on until the screen fulfils the condition, or the process has ended. Returns what
        the screen shows.
        """
        give_up_at = time.monotonic() + seconds
        while not condition(self.screen.lines):
            assert time.monotonic() < give_up_at, "\n".join(self.screen.lines)
            if select.select([self._ours], [], [], 0.1)[0] and not self._read():
                break
        return self.screen.lines

    def end(self, seconds: float = 60.0) -> int:
        """Read to the end; returns the exit code."""
        self.until(lambda _: False, seconds)
        return self.process.wait(20)

    def _read(self) -> bool:
        try:
            data = os.read(self._ours, 65536)
        except OSError as error:  # what Linux says when the other side is closed
            if error.errno != errno.EIO:
                raise
            return False
        self._rest += data
        if _is_whole(self._rest):
            text, self._rest = self._rest.decode(), b""
            self.raw += text
            self.screen.feed(text)
        return bool(data)


def _is_whole(data: bytes) -> bool:
    """Neither half of a character nor half of an escape sequence."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return False
    return re.search(r"\x1b(\[[?0-9;]*)?$", text) is None


def _hear_ctrl_c() -> None:
    """Also where the tests themselves are run in the background of a script, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def terminal(
    folder: Path, command: Sequence[str], columns: int, settings: Mapping[str, str] = NOTHING
) -> Iterator[Terminal]:
    """Runs a command in a terminal of that width, and kills its remaining processes."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    env = {**environment(), "TERM": "xterm", **settings}
    for name in ("COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        env.pop(name, None)
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=_hear_ctrl_c,
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours, columns)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
