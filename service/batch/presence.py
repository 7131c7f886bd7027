"""A locked file for each node of this machine. The kernel drops the lock with the process, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path

from service import clock

OLD_NS = 30 * 86_400 * 1_000_000_000


class Presence:
    """This process's own file. Locked while it lives; a stopped (SIGSTOP) process still holds it."""

    def __init__(self, node: str) -> None:
        _folder().mkdir(mode=0o700, exist_ok=True)
        _clean_up()
        self._path = _folder() / node
        self._file = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def end(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._file)


def is_gone(node: str) -> bool:
    """True if that node ran on this machine and is dead. Where it has no file here, nothing is known: False."""
    try:
        file = os.open(_folder() / node, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(file)


def forget(node: str) -> None:
    """Remove the file of a dead node, once its runs are taken over."""
    (_folder() / node).unlink(missing_ok=True)


def _clean_up() -> None:
    """Remove what is left of ledgers that nobody serves any more."""
    for path in _folder().iterdir():
        with contextlib.suppress(OSError):
            if clock.unix_ns() - path.stat().st_mtime_ns > OLD_NS and is_gone(path.name):
                path.unlink()


def _folder() -> Path:
    return Path(tempfile.gettempdir()) / f"batch-nodes-{os.getuid()}"
