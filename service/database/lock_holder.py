"""Who holds a lock on a file of this machine, where the kernel says it: on Linux in /proc/locks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

LOCKS = Path("/proc/locks")
WRITE_BYTE = "120"
"""The byte of the file `-shm` that a writer has locked: WAL_WRITE_LOCK in SQLite's documentation of its files."""


def of_write_lock(database: str) -> int | None:
    """The id of the process that holds the write lock of this file of SQLite; None if nobody does or it isn't known."""
    for kind, pid, first in _held(f"{os.path.realpath(database)}-shm"):
        if kind == "POSIX" and first == WRITE_BYTE:
            return pid
    return None


def of_file(path: Path) -> int | None:
    """The id of the process that has locked the whole file by flock(); None if nobody has or it isn't known."""
    return next((pid for kind, pid, _ in _held(path) if kind == "FLOCK"), None)


def _held(path: str | Path) -> Iterator[tuple[str, int, str]]:
    """The kind, the process and the first byte of each lock for writing on a file.

    A line of /proc/locks is as `1: POSIX  ADVISORY  WRITE 4711 00:1b:229 120 120`, or has an arrow if it only waits. A
    process of another container has no id here.
    """
    try:
        status, lines = os.stat(path), LOCKS.read_text().splitlines()
    except OSError:
        return
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in lines:
        words = line.split()
        if len(words) == 8 and words[3] == "WRITE" and words[5] == file and int(words[4]) > 0:
            yield words[1], int(words[4]), words[6]
