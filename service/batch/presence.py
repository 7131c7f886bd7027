"""A locked file for each node of this machine. The kernel drops the lock with the process, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path

from sqlalchemy.engine import make_url

from service import clock

OLD_NS = 30 * 86_400 * 1_000_000_000


def folder_of(ledger_url: str) -> Path:
    """Where the nodes of a ledger have their files: beside an SQLite file, which is of this machine as they are."""
    url = make_url(ledger_url)
    if url.get_backend_name() == "sqlite":
        return Path(f"{url.database}.nodes")
    return Path(tempfile.gettempdir()) / f"batch-nodes-{os.getuid()}"


class Presence:
    """This process's own file. Locked while it lives; a stopped (SIGSTOP) process still holds it."""

    def __init__(self, folder: Path, node: str) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        _clean_up(folder)
        self._path = folder / node
        self._file: int | None = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A forked child, such as a process pool's, would hold the lock beyond this process's end.
        os.register_at_fork(after_in_child=self._let_go)

    def end(self) -> None:
        self._path.unlink(missing_ok=True)
        self._let_go()

    def _let_go(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


def is_gone(folder: Path, node: str) -> bool:
    """True if that node ran on this machine and is dead. Where it has no file here, nothing is known: False."""
    try:
        file = os.open(folder / node, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        if os.fstat(file).st_uid != os.getuid():
            return False
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(file)


def forget(folder: Path, node: str) -> None:
    """Remove the file of a dead node, once its runs are taken over."""
    (folder / node).unlink(missing_ok=True)


def _clean_up(folder: Path) -> None:
    """Remove what is left of ledgers that nobody serves any more."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if clock.unix_ns() - path.stat().st_mtime_ns > OLD_NS and is_gone(folder, path.name):
                path.unlink()
