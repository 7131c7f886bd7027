"""A locked file for each node of this machine. The kernel drops the lock with the process, however that ends.

The folder may be one that every user of the machine writes to. So no folder of ours is in it, whose name somebody could
take first: each file has a name that nobody knows beforehand. Only a regular file of this user that names its node
inside counts, so that one which was put there, linked or renamed proves nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import tempfile
from pathlib import Path

from sqlalchemy.engine import URL, make_url

from service import clock
from service.logs import get_logger

logger = get_logger("service.batch")

OLD_NS = 30 * 86_400 * 1_000_000_000
PREFIX = ".batch-node-"
NODE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def folder_of(ledger_url: str | URL) -> Path:
    """Where the nodes of a ledger have their files: that of an SQLite file, which is of this machine as they are."""
    url = make_url(ledger_url)
    if url.get_backend_name() == "sqlite":
        return Path(url.database or "").parent
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:  # no folder can be written to, as is said when the node's file can't be made
        return Path()


def file_of(folder: Path, node: str) -> Path:
    return folder / f"{PREFIX}{node}"


class Presence:
    """This process's own file. Locked while it lives; a stopped (SIGSTOP) process still holds it.

    Where no such file can be had, the node's lease alone decides whether it lives.
    """

    def __init__(self, folder: Path, node: str) -> None:
        self._path = file_of(folder, node)
        self._file: int | None = None
        try:
            _clean_up(folder)
            self._file = _make(self._path, node)
        except OSError as error:
            logger.warning(
                f"this node can't have a locked file in the folder {folder} ({error.strerror}): if its process is "
                "killed, its runs are resumed when its lease is over, and not at once"
            )
        # A forked child, such as a process pool's, would hold the lock beyond this process's end.
        os.register_at_fork(after_in_child=self._let_go)

    def end(self) -> None:
        if self._file is not None:
            self._path.unlink(missing_ok=True)
        self._let_go()

    def _let_go(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


def is_gone(folder: Path, node: str) -> bool:
    """True if that node ran on this machine and is dead. Where it has no file here, nothing is known: False."""
    if NODE.fullmatch(node) is None:
        return False
    try:
        # Without O_NONBLOCK a FIFO, or somebody's lease on a file, would hold this up.
        file = os.open(file_of(folder, node), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return _is_ours(file, node) and _lock(file)
    finally:
        os.close(file)


def forget(folder: Path, node: str) -> None:
    """Remove the file of a dead node, once its runs are taken over."""
    if is_gone(folder, node):
        with contextlib.suppress(OSError):
            file_of(folder, node).unlink()


def _make(path: Path, node: str) -> int:
    """A new file, locked. Raises OSError, and leaves none then: one without a lock would say that its node is dead."""
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(file, node.encode())
    except OSError:
        path.unlink(missing_ok=True)
        os.close(file)
        raise
    return file


def _is_ours(file: int, node: str) -> bool:
    """Whether this open file was made by a process of this user, for this node."""
    found = os.fstat(file)
    is_regular = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
    return is_regular and os.pread(file, len(node) + 1, 0) == node.encode()


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _clean_up(folder: Path) -> None:
    """Remove what is left of ledgers that nobody serves any more."""
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        for entry in found:
            node = entry.name.removeprefix(PREFIX)
            if node != entry.name and _is_old(entry):
                forget(folder, node)


def _is_old(entry: os.DirEntry[str]) -> bool:
    try:
        return clock.unix_ns() - entry.stat(follow_symlinks=False).st_mtime_ns > OLD_NS
    except OSError:  # somebody else has removed it
        return False
