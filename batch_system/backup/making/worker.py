"""Makes a requested backup: `python -m batch_system.backup.making.worker` does so in its own
process, at a low priority.

The request comes as one line on stdin, which then stays open. When stdin ends, the caller has ended
or no longer wants the backup. The worker ignores SIGINT and SIGTERM, because the caller receives
them too and decides.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from batch_system.backup.file.folder import explained, remove_unfinished
from batch_system.backup.file.format import POSTGRESQL, SQLITE
from batch_system.backup.file.progress import BackupMeter, BackupProgress
from batch_system.backup.file.reader import LocalFile
from batch_system.backup.file.verify import verify
from batch_system.backup.file.writer import Archive
from batch_system.backup.making import from_postgresql, from_sqlite
from batch_system.backup.making.request import BackupRequest
from batch_system.concurrency.stoppable import Stop, Stopped
from batch_system.errors import BackupError

Writer = Callable[[BackupRequest, Archive, BackupMeter, Stop], None]
WRITERS: dict[str, Writer] = {POSTGRESQL: from_postgresql.write, SQLITE: from_sqlite.write}
NICE = 10


def carry_out(
    request: BackupRequest,
    partial: Path,
    stop: Stop,
    report: Callable[[BackupProgress], None] | None,
) -> None:
    """Write the backup into the existing file `partial`, and verify it. Raises BackupError and
    Stopped.
    """
    meter = BackupMeter(report)
    with explained(partial.parent):
        with Archive(partial, request.started) as archive:
            WRITERS[request.kind](request, archive, meter, stop)
        _read_back(partial, meter, stop)


def _read_back(partial: Path, meter: BackupMeter, stop: Stop) -> None:
    try:
        with LocalFile(partial) as file:
            meter.begin("verifying", file.size)
            verify(file, stop, lambda member: meter.add(member.packed))
    except BackupError as error:
        raise BackupError(
            f"no backup was made in {partial.parent}, because the new file could not be verified "
            f"({error.message}) The disk may be faulty: look at it, or set BACKUP_DIR to another "
            "folder."
        ) from error


def main() -> None:
    """Read one request from stdin, make the backup, and write progress and the outcome to stdout as
    lines of JSON.
    """
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    os.nice(NICE)
    request, partial, caller = BackupRequest.from_json(sys.stdin.buffer.readline())
    stop = Stop()
    threading.Thread(target=_wait_for_end_of_input, args=(stop,), daemon=True).start()
    try:
        carry_out(request, partial, stop, lambda progress: _answer(progress=asdict(progress)))
        _answer(done=True)
    except BackupError as error:
        _answer(error=error.message)
    except Stopped:
        remove_unfinished(partial)  # the caller may end before it removes the file
    finally:
        # A caller that still lives removes the file of a failed backup itself.
        if os.getppid() != caller:
            remove_unfinished(partial)


def _wait_for_end_of_input(stop: Stop) -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    stop.request()


def _answer(**fields: Any) -> None:
    with suppress(BrokenPipeError):  # the caller has ended, so stdin ends too
        os.write(sys.stdout.fileno(), json.dumps(fields).encode() + b"\n")


if __name__ == "__main__":
    main()
