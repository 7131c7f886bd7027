"""Sources of a backup's bytes: a local file, or any object that can be read by ranges."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from batch_system.errors import BackupError, DamagedBackup
from batch_system.escaping import brief

END_BYTES = 256 * 1024


class Source(Protocol):
    """The bytes of a backup. Its methods block, and several threads may call them at once."""

    @property
    def name(self) -> str:
        """A path or an address for messages, without credentials."""

    @property
    def size(self) -> int:
        """The size in bytes."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes, or fewer at the end of the source. Raises BackupError."""


class LocalFile:
    """A backup in a regular file of this machine. Raises DamagedBackup for a device, a FIFO or a
    folder.

    `follow`: whether a symbolic link is followed, which is intended only for a path that a person
    has given.
    """

    def __init__(self, path: Path, *, follow: bool = True) -> None:
        self.path = path
        self.name = str(path)
        try:
            # Without O_NONBLOCK, opening a FIFO would wait until a process opens it for writing.
            descriptor = os.open(
                path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
            )
        except (OSError, ValueError) as error:
            raise BackupError(
                f"the backup {brief(self.name)} can't be read: {_cause(error)}"
            ) from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise DamagedBackup(
                f"{path} is not a regular file, and so not a backup of this service"
            )
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        self.size = status.st_size

    def read(self, offset: int, length: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), length, offset)
        except OSError as error:
            raise BackupError(
                f"the backup {self.path} can't be read: {error.strerror or error}"
            ) from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


class Fetched:
    """Wraps a source, and reads its last END_BYTES bytes in advance: those of a small backup hold
    the manifest.
    """

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.size = source.size
        self._source = source
        self._end_offset = max(source.size - END_BYTES, 0)
        self._end = source.read(self._end_offset, END_BYTES)

    def read(self, offset: int, length: int) -> bytes:
        if offset < self._end_offset:
            return self._source.read(offset, length)
        return self._end[offset - self._end_offset :][:length]


def _cause(error: OSError | ValueError) -> str:
    if isinstance(error, ValueError):
        return "no file can have such a name"
    return "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror or str(error)
