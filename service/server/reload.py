"""`batch serve --reload`: a process that serves, and this one, which starts it anew when a source file changes.

This one holds the listening socket, so that the port stays the same and nobody is refused in between. It never imports
what it watches a second time: a file that can't be imported ends the process that serves, and this one waits for the
next change.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from service import clock, console, logs
from service.batch.tasks.discovery import folder_of
from service.config import ENV_FILE, Settings, get_settings, refresh_settings
from service.errors import BatchError, InvalidSetting
from service.server import uvicorn as server

logger = logs.get_logger("service.batch")

SUFFIXES = (".py", ".sql", ".html", ".css", ".js")
"""What is source. Everything else may be written by the tasks themselves."""

LOOK_SECONDS = 0.25
"""Files are looked at, not listened to: that works in containers and on network drives too, and takes 2 ms."""

GIVE_UP_SECONDS = 10.0
"""How long after DRAIN_SECONDS a process may take to end; beyond that a task blocks its event loop."""


def serve(settings: Settings, host: str | None = None, port: int | None = None) -> None:
    """Serve until SIGTERM or SIGINT, in a process that is drained and replaced when a source file or `.env` changes.

    HOST and PORT are read once. Raises BatchError when it can't listen.
    """
    logs.set_up(settings.LOG_LEVEL, settings.LOG_FORMAT)
    with server.listen(settings, host, port) as listening:
        _Reloader(settings, listening).run()
    logs.flush()


class _Reloader:
    """The process that serves, from one change to the next."""

    def __init__(self, settings: Settings, listening: socket.socket) -> None:
        self._settings = settings
        self._listening = listening
        self._is_stopping = False
        self._is_impatient = False
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # the one queue that a signal handler may put into
        self._watched, self._alive = os.pipe()

    def run(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        self._start()
        while not self._is_stopping:
            if changed := self._wait_for_changes():
                logger.info(f"reloading: {changed}")
                self._end()
                self._start()
        self._end()

    def _on_signal(self, number: int, frame: object) -> None:
        self._is_impatient |= self._is_stopping and number == signal.SIGINT
        self._is_stopping = True
        self._wake.put(None)

    def _rest(self, seconds: float) -> None:
        """Returns early when a signal comes."""
        with contextlib.suppress(queue.Empty):
            self._wake.get(timeout=seconds)

    def _start(self) -> None:
        """Start a process that serves, unless a signal came while the one before it ended."""
        if self._is_stopping:
            return
        self._settings = _newest(self._settings)
        self._folder = _folder(self._settings.TASKS_DIR)
        self._seen = sources(self._folder)
        self._is_ended = False
        inherited = (self._listening.fileno(), self._watched)
        # Ctrl-C reaches every process of the terminal. This one passes it on, once; the other would take the second
        # signal for impatience, and not drain. A mask is inherited from before the first line of Python.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "service.server.reload", *map(str, inherited)], pass_fds=inherited
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def _wait_for_changes(self) -> str:
        """One look: the names of the files that changed, once no more do; empty when none did."""
        self._rest(LOOK_SECONDS)
        self._say_when_ended()
        found = sources(self._folder)
        while found != self._seen and not self._is_stopping:
            self._rest(LOOK_SECONDS)
            before, found = found, sources(self._folder)
            if found == before:
                return ", ".join(sorted({os.path.relpath(path) for path, _ in found.items() ^ self._seen.items()}))
        return ""

    def _say_when_ended(self) -> None:
        if not self._is_ended and self._process.poll() is not None:
            self._is_ended = True
            code = self._process.returncode
            logger.error(f"the service has ended (exit code {code}); it starts again when a file changes")

    def _end(self) -> None:
        """Let the process drain. A second Ctrl-C ends it at once, and so does its own failure to end in time."""
        self._process.terminate()
        give_up_at = clock.monotonic() + self._settings.DRAIN_SECONDS + GIVE_UP_SECONDS
        while self._process.poll() is None and not self._is_impatient:
            if clock.monotonic() > give_up_at:
                logger.error("the service does not end: a task blocks the event loop; its runs are resumed")
                break
            self._rest(0.02)
        self._process.kill()
        self._process.wait()


def _newest(settings: Settings) -> Settings:
    """As `.env` is now; what is wrong in it, the process that serves will say."""
    try:
        return refresh_settings()
    except InvalidSetting:
        return settings


def _folder(place: Path) -> Path:
    """That of the tasks; where there is none yet, the process that serves says so, and this one waits for it."""
    try:
        return folder_of(place)
    except InvalidSetting:
        return place


def sources(folder: Path) -> dict[Path, int]:
    """The files that count, of `folder` and of this package, and `.env`: each with when it was changed (ns)."""
    found = {}
    for path in (ENV_FILE, *_files(folder), *_files(Path(__file__).parents[1])):
        with contextlib.suppress(OSError):  # it is not there, or not any more
            found[path] = path.stat().st_mtime_ns
    return found


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        yield from (Path(place, name) for name in names if name.endswith(SUFFIXES) and not name.startswith("."))


def main() -> None:
    """Serve in this process: `python -m service.server.reload SOCKET PIPE`, two descriptors that it has inherited."""
    listening, alive = map(int, sys.argv[1:])
    threading.Thread(target=_end_with_the_reloader, args=(alive,), daemon=True).start()
    try:
        server.serve_on(socket.socket(fileno=listening), get_settings())
    except BatchError as error:
        console.warn(f"batch: {error.message}")
        raise SystemExit(2) from None


def _end_with_the_reloader(alive: int) -> None:
    """The pipe ends when the process at its other end does, whatever ended that. It would keep the port for ever."""
    os.read(alive, 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
