"""Where a backup's bytes come from."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from service.errors import BackupError


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
    """A backup on this machine's disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        try:
            self._file = path.open("rb", buffering=0)
            self.size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise BackupError(f"the backup {path} can't be read: {error.strerror or error}") from error

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
