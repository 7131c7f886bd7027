"""Writes the container: a tar whose pieces are gzip members of their own, so that they can be made independently."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from isal import igzip

from service.backup.folder import explained

FORMAT = 1
PART_BYTES = 2 * 1024 * 1024
HEADER, MANIFEST, COPY_SUFFIX = "header.json", "manifest.json", ".copy"
TAR_END = bytes(2 * tarfile.BLOCKSIZE)


class Archive:
    """A backup being written to `path`. Not one byte is kept in memory beyond the piece at hand."""

    def __init__(self, path: Path, taken_at: datetime) -> None:
        self.path = path
        self.taken_at = taken_at
        self._members: list[dict[str, Any]] = []
        self._file = path.open("r+b")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def add_header(self, kind: str, **facts: Any) -> None:
        """The first member: what somebody who lists backups wants to know."""
        taken_at = self.taken_at.isoformat(timespec="seconds")
        self._add(HEADER, _json({"format": FORMAT, "kind": kind, "taken_at": taken_at, **facts}))

    def add_rows(self, name: str, rows: bytes) -> int:
        """A member of whole COPY rows; returns how many they are."""
        count = rows.count(b"\n")
        self._record(name, len(rows), hashlib.sha256(rows).hexdigest(), rows=count)
        self._add(name, rows)
        return count

    def add_file(self, name: str, size: int, pieces: Iterable[bytes]) -> None:
        """A member of any size, each of its pieces compressed by itself."""
        digest = hashlib.sha256()
        self._write(self._tar_header(name, size))
        for piece in pieces:
            digest.update(piece)
            self._write(piece)
        self._write(_padding(size))
        self._record(name, size, digest.hexdigest())

    def finish(self, **contents: Any) -> None:
        """The last member, and everything on the disk."""
        manifest = {"format": FORMAT, **contents, "members": self._members}
        self._add(MANIFEST, _json(manifest), TAR_END)
        with explained(self.path.parent):
            self._file.flush()
            os.fsync(self._file.fileno())

    def _record(self, name: str, size: int, sha256: str, **more: int) -> None:
        self._members.append({"name": name, "bytes": size, "sha256": sha256, **more})

    def _add(self, name: str, data: bytes, end: bytes = b"") -> None:
        self._write(b"".join((self._tar_header(name, len(data)), data, _padding(len(data)), end)))

    def _write(self, data: bytes) -> None:
        with explained(self.path.parent):
            if data:
                self._file.write(igzip.compress(data, 1, mtime=0))

    def _tar_header(self, name: str, size: int) -> bytes:
        info = tarfile.TarInfo(name)
        info.size = size
        info.mode = 0o600
        info.mtime = int(self.taken_at.timestamp())
        return info.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n"
