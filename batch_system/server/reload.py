"""`batch serve --reload`: a reloader that starts the service as a child process, and restarts it on
source changes.

The reloader keeps the listening socket, so that the port stays the same and no connection is
refused during a restart. It does not import the watched files. A file that can't be imported ends
the child, and the reloader waits for the next change.
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
from itertools import chain
from pathlib import Path

from batch_system import clock, console, logs
from batch_system.batch.tasks.discovery import folder_of
from batch_system.errors import BatchError, InvalidSetting
from batch_system.server import uvicorn as server
from batch_system.settings.project_file import PROJECT_FILE
from batch_system.settings.reading import get_settings, refresh_settings
from batch_system.settings.settings import ENV_FILE, Settings

logger = logs.get_logger("batch_system.batch")

SUFFIXES = (".py", ".sql", ".html", ".css", ".js")
"""The suffixes of source files. Files with other suffixes may be written by tasks."""

APPLICATION = Path("service")
"""The package of a clone's own application."""

LOOK_SECONDS = 0.25
"""The time between two scans of the files. A scan takes 2 ms, and also works in containers and on
network drives.
"""

GIVE_UP_SECONDS = 10.0
"""A child that has not ended this long after DRAIN_SECONDS is killed, because a task blocks its
event loop.
"""


def serve(settings: Settings, host: str | None = None, port: int | None = None) -> None:
    """Serve until SIGTERM or SIGINT in a child process, which is restarted if a source file or
    `.env` changes.

    HOST and PORT are read once. Raises BatchError if the address can't be used.
    """
    logs.set_up(settings.LOG_LEVEL, settings.LOG_FORMAT)
    with server.listen(settings, host, port) as listening:
        _Reloader(settings, listening).run()
    logs.flush()


class _Reloader:
    """Runs the child process, and restarts it on each change."""

    def __init__(self, settings: Settings, listening: socket.socket) -> None:
        self._settings = settings
        self._listening = listening
        self._is_stopping = False
        self._is_impatient = False
        # The only kind of queue with a put() that is safe in a signal handler.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._watched, self._alive = os.pipe()

    def run(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
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

    def _sleep(self, seconds: float) -> None:
        """Sleep, but return early on a signal."""
        with contextlib.suppress(queue.Empty):
            self._wake.get(timeout=seconds)

    def _start(self) -> None:
        """Start a child process, unless a signal came while the last one ended."""
        if self._is_stopping:
            return
        self._settings = _newest(self._settings)
        self._folder = _folder(self._settings.TASKS_DIR)
        self._seen = sources(self._folder)
        self._is_ended = False
        inherited = (self._listening.fileno(), self._watched)
        # A terminal sends Ctrl-C, and its end, to all of its processes, and this process passes
        # both on as SIGTERM. The child would take the second signal for a request to end at once.
        # It inherits the mask, which therefore holds from its very start.
        from_terminal = {signal.SIGINT, signal.SIGHUP}
        signal.pthread_sigmask(signal.SIG_BLOCK, from_terminal)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "batch_system.server.reload", *map(str, inherited)],
                pass_fds=inherited,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, from_terminal)

    def _wait_for_changes(self) -> str:
        """Scan once. Returns the names of changed files once no more files change, or an empty
        string.
        """
        self._sleep(LOOK_SECONDS)
        self._log_end_of_child()
        current = sources(self._folder)
        while current != self._seen and not self._is_stopping:
            self._sleep(LOOK_SECONDS)
            previous, current = current, sources(self._folder)
            if current == previous:
                return ", ".join(
                    sorted(
                        {os.path.relpath(path) for path, _ in current.items() ^ self._seen.items()}
                    )
                )
        return ""

    def _log_end_of_child(self) -> None:
        if not self._is_ended and self._process.poll() is not None:
            self._is_ended = True
            code = self._process.returncode
            logger.error(
                f"the service has ended (exit code {code}); it starts again when a file changes"
            )

    def _end(self) -> None:
        """Let the child drain, and wait for its end. Kill it on a second Ctrl-C, or if it does not
        end in time.
        """
        self._process.terminate()
        give_up_at = clock.monotonic() + self._settings.DRAIN_SECONDS + GIVE_UP_SECONDS
        while self._process.poll() is None and not self._is_impatient:
            if clock.monotonic() > give_up_at:
                logger.error(
                    "the service does not end, because a task blocks the event loop; it is "
                    "killed, its runs are resumed"
                )
                break
            self._sleep(0.02)
        self._process.kill()
        self._process.wait()


def _newest(settings: Settings) -> Settings:
    """The settings of the current `.env`, or the old ones if it is invalid. The child reports the
    error.
    """
    try:
        return refresh_settings()
    except InvalidSetting:
        return settings


def _folder(place: Path) -> Path:
    """The folder of the tasks, or `place` if it does not exist yet. The child reports that, and
    `place` is watched.
    """
    try:
        return folder_of(place)
    except InvalidSetting:
        return place


def sources(folder: Path) -> dict[Path, int]:
    """The source files in `folder`, in `service` and in this package, and the files with settings,
    each with its modification time in nanoseconds.
    """
    times = {}
    folders = (folder, APPLICATION, Path(__file__).parents[1])
    for path in (ENV_FILE, PROJECT_FILE, *chain.from_iterable(map(_files, folders))):
        with contextlib.suppress(OSError):  # the file does not exist, or has just been deleted
            times[path] = path.stat().st_mtime_ns
    return times


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        yield from (
            Path(place, name)
            for name in names
            if name.endswith(SUFFIXES) and not name.startswith(".")
        )


def main() -> None:
    """Serve in this process: `python -m batch_system.server.reload SOCKET PIPE`, with two inherited
    file descriptors.
    """
    listening, alive = map(int, sys.argv[1:])
    threading.Thread(target=_end_with_the_reloader, args=(alive,), daemon=True).start()
    try:
        server.serve_on(socket.socket(fileno=listening), get_settings())
    except BatchError as error:
        console.warn(f"batch: {error.message}")
        raise SystemExit(2) from None


def _end_with_the_reloader(alive: int) -> None:
    """End this process, which would keep the port, when the reloader ends in any way, because that
    closes the pipe.
    """
    os.read(alive, 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
