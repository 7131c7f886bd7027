"""Backs up the application's database into a new file of a folder: starts the process that makes
the backup, sends the request to it, and reads its answers.
"""

from __future__ import annotations

import asyncio
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

from sqlalchemy.engine import make_url

from batch_system import clock
from batch_system.backup.file.folder import explained, remove_abandoned, reserve
from batch_system.backup.file.format import POSTGRESQL, SQLITE
from batch_system.backup.file.progress import BackupProgress
from batch_system.backup.file.selection import Selection
from batch_system.backup.making.request import BackupRequest
from batch_system.concurrency.own_process import arguments_of
from batch_system.concurrency.stoppable import Stop, in_thread
from batch_system.database.urls import connect_arguments, safe_url
from batch_system.errors import BackupError
from batch_system.settings.reading import get_settings
from batch_system.settings.settings import Settings

COMMAND = arguments_of("batch_system.backup.making.worker")
KILL_AFTER_SECONDS = 1.0
"""Less than the time that a drain gives to cancelled work, so that this process can remove the
partial file.
"""
KINDS = {"sqlite+aiosqlite": SQLITE, "postgresql+asyncpg": POSTGRESQL}

OnProgress = Callable[[BackupProgress], None] | None


async def create_backup(output_dir: Path, *, on_progress: OnProgress = None) -> Path:
    """Back up the application's database (DATABASE_URL) into `output_dir`, which is created if it
    is missing.

    Returns the path of the new file. Raises BackupError, whose message says what to do. After an
    error or a cancel no part of the new backup remains, and older backups are unchanged. The work
    is done in a process of its own, at a low priority. `on_progress` is called on the event loop.
    """
    request = _backup_request(get_settings())
    loop = asyncio.get_running_loop()

    def report(progress: BackupProgress) -> None:
        if on_progress:
            loop.call_soon_threadsafe(on_progress, progress)

    return await in_thread(lambda stop: _create(request, Path(output_dir), stop, report))


def create_backup_sync(output_dir: Path) -> Path:
    """Do what create_backup() does, for scripts without an event loop. Raises BackupError."""
    request = _backup_request(get_settings())
    return _create(request, Path(output_dir), Stop(), None)


def _backup_request(settings: Settings) -> BackupRequest:
    setting, database_url = settings.backup_database
    url = make_url(database_url)
    if url.drivername not in KINDS:
        raise BackupError(
            f"can't back up {url.drivername}: {setting} must be one of {', '.join(KINDS)}"
        )
    kind = KINDS[url.drivername]
    return BackupRequest(
        kind=kind,
        database=url.database or "",
        safe_url=safe_url(url),
        started=clock.now(),
        selection=Selection.of(
            settings.BACKUP_INCLUDE, settings.BACKUP_EXCLUDE, settings.BACKUP_LEDGER
        ),
        arguments=connect_arguments(url) if kind == POSTGRESQL else {},
        setting=setting,
    )


def _create(request: BackupRequest, folder: Path, stop: Stop, on_progress: OnProgress) -> Path:
    with explained(folder), reserve(folder, request.started) as reservation:
        remove_abandoned(folder, request.started)
        run_worker(request, reservation.partial, stop, on_progress)
        return reservation.publish()


def run_worker(request: BackupRequest, partial: Path, stop: Stop, report: OnProgress) -> None:
    """Start a worker that writes the backup into `partial`, and wait for its end.

    Raises BackupError, with the worker's message if the worker failed; Stopped after a request to
    stop.
    """
    process = _start(partial)
    with process:
        try:
            _send(process, request.as_json(partial))
            with stop.calling(lambda: _ask_to_end(process)):
                answer = _last_answer(process.stdout, report)
                process.wait()
            stop.check()
        finally:
            process.kill()
    if "error" in answer:
        raise BackupError(answer["error"])
    if "done" not in answer:
        raise BackupError(
            f"no backup was made in {partial.parent}: its process "
            f"{_describe_end(process.returncode)}"
        )


def _start(partial: Path) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            (sys.executable or "", *COMMAND), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    except (OSError, ValueError) as error:
        raise BackupError(
            f"no backup was made in {partial.parent}: no process could be started for it "
            f"({error}). Each backup runs in a process of its own, by the interpreter "
            f"{sys.executable or '(sys.executable is empty)'}"
        ) from error


def _send(process: subprocess.Popen[bytes], line: bytes) -> None:
    """Send the request through a pipe, because other users can see a command line, and the request
    has a password.
    """
    with suppress(BrokenPipeError):  # the exit status of the process shows how it ended
        # Unbuffered: a buffer would retry when it is closed.
        os.write(_input(process).fileno(), line)


def _ask_to_end(process: subprocess.Popen[bytes]) -> None:
    """Close the input of the worker, which then cleans up and ends; kill it after
    KILL_AFTER_SECONDS.
    """
    with suppress(BrokenPipeError):
        _input(process).close()
    timer = threading.Timer(KILL_AFTER_SECONDS, process.kill)
    timer.daemon = True
    timer.start()


def _input(process: subprocess.Popen[bytes]) -> IO[bytes]:
    if process.stdin is None:
        raise RuntimeError("the process was started without a pipe")
    return process.stdin


def _last_answer(lines: IO[bytes] | None, report: OnProgress) -> dict[str, Any]:
    """Report each progress that the worker writes, and return the last line, which says how the
    backup ended.
    """
    answer: dict[str, Any] = {}
    for line in lines or ():
        answer = json.loads(line)
        if "progress" in answer and report:
            report(BackupProgress(**answer["progress"]))
    return answer


def _describe_end(status: int) -> str:
    if status == -signal.SIGKILL:
        return "was killed (SIGKILL). Memory may have run out: look at the system's log"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}: look at its output on stderr"
