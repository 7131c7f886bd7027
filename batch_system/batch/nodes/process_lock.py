"""Process locks: each node of this machine keeps a locked file. The kernel drops the lock whenever
the process ends.

All users of the machine may be able to write to the folder. Another user could create a subfolder
with a fixed name first, so there is none, and each file has a name that can't be guessed. A file
counts only if it is a regular file of this user and contains the id of its node. Files that other
users have put there, linked or renamed are ignored.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import stat
import tempfile
from pathlib import Path

from sqlalchemy.engine import URL, make_url

from batch_system import clock
from batch_system.database import lock_holder
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

OLD_NS = 30 * 86_400 * 1_000_000_000
"""Older files of dead nodes are removed, even if no node has rescued the runs: 30 days, in
nanoseconds.
"""
PREFIX = ".batch-node-"
NODE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def folder_of(ledger_url: str | URL) -> Path:
    """The folder of the locked files: that of the ledger's SQLite file, otherwise the folder for
    temporary files.
    """
    url = make_url(ledger_url)
    if url.get_backend_name() == "sqlite":
        return Path(url.database or "").parent
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:  # no folder is writable; ProcessLock then logs a warning
        return Path()


def file_of(folder: Path, node: str) -> Path:
    return folder / f"{PREFIX}{node}"


class ProcessLock:
    """The locked file of this process. It stays locked until the process ends, even while the
    process is stopped (SIGSTOP).

    If the file can't be made, only the lease of the node decides whether it is alive.
    """

    def __init__(self, folder: Path, node: str) -> None:
        self._path = file_of(folder, node)
        self._file: int | None = None
        try:
            _clean_up(folder)
            self._file = _make(self._path, node)
        except OSError as error:
            logger.warning(
                f"this node can't lock a file in the folder {folder} ({error.strerror}): if "
                "its process is killed, its runs are resumed only when its lease has ended, not at "
                "once"
            )
        # Otherwise a forked child, such as a worker of a process pool, would keep the lock after
        # this process ends.
        os.register_at_fork(after_in_child=self._release)

    def remove(self) -> None:
        """Remove the file and release the lock."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
        self._release()

    def _release(self) -> None:
        file = self._file
        self._file = None
        if file is not None:
            os.close(file)


def has_file(folder: Path, node: str) -> bool:
    """Whether a node has, or has had, a locked file on this machine."""
    return NODE.fullmatch(node) is not None and file_of(folder, node).exists()


def is_gone(folder: Path, node: str) -> bool:
    """Whether the node was on this machine and its process has ended. False if it has no file
    here.
    """
    if NODE.fullmatch(node) is None:
        return False
    try:
        # Without O_NONBLOCK this would block on a FIFO, or on a file on which another process holds
        # a kernel lease.
        file = os.open(
            file_of(folder, node), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        )
    except OSError:
        return False
    try:
        return _is_ours(file, node) and _lock(file)
    finally:
        os.close(file)


def remove_if_gone(folder: Path, node: str) -> None:
    """Remove the file of a dead node. Call it after the rescue of its runs was committed."""
    if is_gone(folder, node):
        with contextlib.suppress(OSError):
            file_of(folder, node).unlink()


def end_if_frozen(folder: Path, node: str, ledger: str) -> None:
    """Kill the process of a node of this machine that is stopped while it holds the write lock of
    the ledger's file.

    Call it for a node that has been silent for a whole lease. The lock can't be taken from it, so
    no other process could write until it continues. On PostgreSQL, the connections of such a node
    are ended instead.
    """
    process = lock_holder.of_write_lock(ledger)
    if (
        process is None
        or process != lock_holder.of_file(file_of(folder, node))
        or not _is_stopped(process)
    ):
        return
    logger.critical(
        f"the process {process} of node {node} is stopped (by SIGSTOP, Ctrl-Z or a debugger) and "
        "holds the write lock of the ledger, so it is killed: no other process could write until "
        "it goes on. Its runs are resumed"
    )
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process, signal.SIGKILL)


def _is_stopped(process: int) -> bool:
    """Whether a signal or a debugger has stopped the process: T or t in proc(5)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def _make(path: Path, node: str) -> int:
    """Make a new file and lock it; returns its descriptor. Raises OSError.

    If the lock fails, the file is removed, because a file without a lock would mean that its node
    is dead.
    """
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
    """Whether this open file is a regular file of this user that contains the id of this node."""
    status = os.fstat(file)
    is_own_file = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
    return is_own_file and os.pread(file, len(node) + 1, 0) == node.encode()


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _clean_up(folder: Path) -> None:
    """Remove old files of dead nodes. They remain if their ledger is no longer used."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            node = entry.name.removeprefix(PREFIX)
            if node != entry.name and _is_old(entry):
                remove_if_gone(folder, node)


def _is_old(entry: os.DirEntry[str]) -> bool:
    try:
        return clock.unix_ns() - entry.stat(follow_symlinks=False).st_mtime_ns > OLD_NS
    except OSError:  # another process has removed it
        return False
