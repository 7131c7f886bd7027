"""Which process holds a lock on a file of this machine, if the kernel tells: on Linux in
/proc/locks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LOCKS = Path("/proc/locks")
WRITER, READERS = range(120, 121), range(123, 128)
"""The bytes of the file `-shm` that a writer or a reader locks, by SQLite's documentation of its
files.
"""


class _Lock(NamedTuple):
    kind: str
    mode: str
    process: int
    first: int
    last: float

    def overlaps(self, some: range) -> bool:
        return self.kind == "POSIX" and self.first < some.stop and self.last >= some.start


def of_write_lock(database: str) -> int | None:
    """The id of the process that holds the write lock of this SQLite file, if there is one and it
    is known.
    """
    held = _held(f"{os.path.realpath(database)}-shm")
    return next(
        (lock.process for lock in held if lock.mode == "WRITE" and lock.overlaps(WRITER)), None
    )


def readers(database: str) -> list[int]:
    """The ids of the processes that read this SQLite file now, as far as they are known."""
    return sorted(
        {
            lock.process
            for lock in _held(f"{os.path.realpath(database)}-shm")
            if lock.overlaps(READERS)
        }
    )


def of_file(path: Path) -> int | None:
    """The id of the process that has locked the whole file with flock(), if there is one and it is
    known.
    """
    return next(
        (lock.process for lock in _held(path) if lock.kind == "FLOCK" and lock.mode == "WRITE"),
        None,
    )


def _held(path: str | Path) -> Iterator[_Lock]:
    """The locks on a file. A process of another container has no id here, so its locks are left
    out.

    A line of /proc/locks looks like `1: POSIX  ADVISORY  WRITE 4711 00:1b:229 120 120`, with an
    arrow if it only waits.
    """
    try:
        status, lines = os.stat(path), LOCKS.read_text().splitlines()
    except OSError:
        return
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in lines:
        words = line.split()
        if len(words) == 8 and words[5] == file and int(words[4]) > 0:
            last = float("inf") if words[7] == "EOF" else int(words[7])
            yield _Lock(words[1], words[3], int(words[4]), int(words[6]), last)
