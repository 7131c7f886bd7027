"""Makes a requested backup: `python -m service.backup.making.worker` does so in its own process, at a low priority.

The request comes as one line on stdin, which then stays open. The end of stdin means that the caller no longer wants
the backup, or has ended. The worker ignores signals: the caller receives them too, and decides.
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

from service.backup.file.folder import explained, remove_unfinished
from service.backup.file.format import POSTGRESQL, SQLITE
from service.backup.file.progress import BackupMeter, BackupProgress
from service.backup.file.reader import LocalFile
from service.backup.file.verify import verify
from service.backup.file.writer import Archive
from service.backup.making import from_postgresql, from_sqlite
from service.backup.making.request import BackupRequest
from service.concurrency.stoppable import Stop, Stopped
from service.errors import BackupError

Writer = Callable[[BackupRequest, Archive, BackupMeter, Stop], None]
WRITERS: dict[str, Writer] = {POSTGRESQL: from_postgresql.write, SQLITE: from_sqlite.write}
NICE = 10


def carry_out(
    request: BackupRequest, partial: Path, stop: Stop, report: Callable[[BackupProgress], None] | None
) -> None:
    """Write the backup into the file that is there already, and read it back."""
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
            f"no backup was made in {partial.parent}, as what was written can't be read back ({error.message}) "
            "The disk may be faulty: look at it, or set BACKUP_DIR to another folder."
        ) from error


def main() -> None:
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    os.nice(NICE)
    request, partial, requested_by = BackupRequest.from_json(sys.stdin.buffer.readline())
    stop = Stop()
    threading.Thread(target=_until_unwanted, args=(stop,), daemon=True).start()
    try:
        carry_out(request, partial, stop, lambda progress: _say(progress=asdict(progress)))
        _say(done=True)
    except BackupError as error:
        _say(error=error.message)
    except Stopped:
        remove_unfinished(partial)  # that process may end before it comes to it
    finally:
        if os.getppid() != requested_by:  # a caller that is alive removes the file of a failed backup itself
            remove_unfinished(partial)


def _until_unwanted(stop: Stop) -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    stop.request()


def _say(**what: Any) -> None:
    with suppress(BrokenPipeError):  # nobody listens any more, which the end of the input says too
        os.write(sys.stdout.fileno(), json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    main()
