"""Where a backup's bytes come from."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from service.errors import BackupError, DamagedBackup
from service.escaping import brief

END_BYTES = 256 * 1024


class Source(Protocol):
    """Where a backup's bytes come from. Threads call it, several at once, never the loop."""

    @property
    def name(self) -> str:
        """For messages: a path or an address, without credentials."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes, or fewer at the end. Raises BackupError."""


class LocalFile:
    """A backup on this machine's disk: a file, and nothing else that can be opened.

    `follow`: a link counts as what it leads to, which only a person may want who names it.
    """

    def __init__(self, path: Path, *, follow: bool = True) -> None:
        self.path = path
        self.name = str(path)
        try:
            # Without O_NONBLOCK a FIFO waits here for who writes into it.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW))
        except (OSError, ValueError) as error:
            raise BackupError(f"the backup {brief(self.name)} can't be read: {_cause(error)}") from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise DamagedBackup(f"{path} is no file, and so no backup of this service")
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        self.size = status.st_size

    def read(self, offset: int, length: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), length, offset)
        except OSError as error:
            raise BackupError(f"the backup {self.path} can't be read: {error.strerror or error}") from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Fetched:
    """Another source, whose last bytes were read at once: of a small backup they hold the manifest."""

    def __init__(self, source: Source) -> None:
        self.name, self.size = source.name, source.size
        self._source = source
        self._start = max(source.size - END_BYTES, 0)
        self._end = source.read(self._start, END_BYTES)

    def read(self, offset: int, length: int) -> bytes:
        if offset < self._start:
            return self._source.read(offset, length)
        return self._end[offset - self._start :][:length]


def _cause(error: OSError | ValueError) -> str:
    if isinstance(error, ValueError):
        return "no file can have such a name"
    return "it is a link" if error.errno == errno.ELOOP else error.strerror or str(error)
