"""Starts the process that makes a backup, sends the request to it, and reads its answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from service.backup.file.progress import BackupProgress
from service.backup.making.request import BackupRequest
from service.concurrency.stoppable import Stop
from service.errors import BackupError

COMMAND = (
    "-P",
    "-c",
    "import sys; sys.path.insert(0, sys.argv.pop()); from service.backup.making.worker import main; main()",
    str(Path(__file__).parents[2]),
)
"""As `-m service.backup.making.worker`, wherever this package was imported from."""
KILL_AFTER_SECONDS = 1.0
"""Less than a drain leaves to what it has cancelled: the file is then removed here."""


def carry_out(
    request: BackupRequest, partial: Path, stop: Stop, report: Callable[[BackupProgress], None] | None
) -> None:
    """Have the worker write the backup into `partial`. Raises BackupError, also for what the worker raised."""
    process = _start(partial)
    with process:
        try:
            _hand_over(process, request.as_json(partial))
            with stop.calling(lambda: _end(process)):
                result = _listen(process.stdout, report)
                process.wait()
            stop.check()
        finally:
            process.kill()
    if "error" in result:
        raise BackupError(result["error"])
    if "done" not in result:
        raise BackupError(f"no backup was made in {partial.parent}: its process {_ending(process.returncode)}")


def _start(partial: Path) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen((sys.executable or "", *COMMAND), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    except (OSError, ValueError) as error:
        raise BackupError(
            f"no backup was made in {partial.parent}: no process could be started for it ({error}). Each backup has a "
            f"process of its own, which runs {sys.executable or 'no interpreter: sys.executable is empty'}"
        ) from error


def _hand_over(process: subprocess.Popen[bytes], line: bytes) -> None:
    """By a pipe: a command line, which everybody can see, must not have the password."""
    with suppress(BrokenPipeError):  # how it ended is said by its exit status
        os.write(_input(process).fileno(), line)  # what a buffer could not send it would send again when it is closed


def _end(process: subprocess.Popen[bytes]) -> None:
    """The end of its input asks it to clean up; it is not waited for for ever."""
    with suppress(BrokenPipeError):
        _input(process).close()
    timer = threading.Timer(KILL_AFTER_SECONDS, process.kill)
    timer.daemon = True
    timer.start()


def _input(process: subprocess.Popen[bytes]) -> IO[bytes]:
    if process.stdin is None:
        raise RuntimeError("the process was started without a pipe")
    return process.stdin


def _listen(lines: IO[bytes] | None, report: Callable[[BackupProgress], None] | None) -> dict[str, Any]:
    """The last line says how it ended; those before it how far it is."""
    said: dict[str, Any] = {}
    for line in lines or ():
        said = json.loads(line)
        if "progress" in said and report:
            report(BackupProgress(**said["progress"]))
    return said


def _ending(status: int) -> str:
    if status == -signal.SIGKILL:
        return "was killed (SIGKILL). Memory may have run out: look at the system's log"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}: what it wrote on stderr says why"
