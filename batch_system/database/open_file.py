"""The file of an SQLite database that this process uses, and whether its path still leads to it."""

from __future__ import annotations

import os
import sqlite3
from contextlib import suppress

from sqlalchemy.engine import URL


class OpenFile:
    """Knows which file, and which write-ahead log beside it, a process has opened under a path.

    A process that has a deleted file open can still read and write it, so no statement ever fails.
    The connection here is kept, because SQLite deletes the log when the last connection is closed:
    so another log under the same path always belongs to another program. It blocks, so make it in a
    thread.
    """

    def __init__(self, path: str) -> None:
        """Raises sqlite3.Error and OSError."""
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.execute(
            "SELECT count(*) FROM sqlite_master"
        ).fetchone()  # this opens the log
        self._files = {name: _identity(name) for name in (path, f"{os.path.realpath(path)}-wal")}

    @property
    def trouble(self) -> str | None:
        """What has happened to the file or to its log, and what to do about it; None while both are
        the same.
        """
        for path, identity in self._files.items():
            with suppress(PermissionError):  # it can't be checked now
                if _identity(path) != identity:
                    return f"the file {path} was deleted or replaced: restart it"
        return None

    def close(self) -> None:
        self._connection.close()


def of(url: URL) -> OpenFile | None:
    """The file of a database; None if it is not SQLite, or if the URL opens it in a special way."""
    if url.get_backend_name() != "sqlite" or not url.database or url.query.get("uri"):
        return None
    return OpenFile(url.database)


def _identity(path: str) -> tuple[int, int] | None:
    """The device and the inode; None if there is no such file. The file is not opened, because
    closing it would drop its locks.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
