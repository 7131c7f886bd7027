"""Writes a backup's file: two threads compress its pieces, which are written in the order in which
they were added.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

from batch_system.backup.file.folder import explained
from batch_system.backup.file.format import (
    FORMAT,
    HEADER,
    LARGEST_JSON,
    LARGEST_MANIFEST,
    MANIFEST,
    MEMBER_JSON,
    PIECE_BYTES,
    TAR_END,
    Member,
    Trailer,
    padding,
)
from batch_system.backup.file.igzip import igzip
from batch_system.backup.file.manifest import Manifest
from batch_system.errors import BackupError

PACKERS = 2
AHEAD = 4
"""How many pieces of one file may wait to be packed, so that memory is bounded."""
TOO_LARGE = "the database is larger than these backups can be: use pgBackRest, or exclude tables"


@dataclass(frozen=True)
class _Piece:
    """A part of the archive's file `name`. `before` and `after`: the tar header and the padding
    around it.
    """

    name: str
    content: Sequence[bytes | bytearray | memoryview]
    has_rows: bool
    before: bytes = b""
    after: bytes = b""


class Archive:
    """Writes a backup to `path`. Only one thread may add to it. Memory holds only the pieces that
    are being packed.
    """

    def __init__(self, path: Path, taken_at: datetime) -> None:
        self.path = path
        self.taken_at = taken_at
        self._members: list[Member] = []
        self._header: dict[str, Any] = {}
        self._file = path.open("r+b")
        self._end = 0
        self._lock = Lock()
        self._added = 0
        self._packed: dict[int, tuple[_Piece, int, int | None, bytes, bytes]] = {}
        self._packers = ThreadPoolExecutor(PACKERS, thread_name_prefix="backup-pack")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._packers.shutdown(cancel_futures=True)
        self._file.close()

    def add_header(self, kind: str, **facts: Any) -> None:
        """Write the first member. `facts`: the other fields of `Header`."""
        taken_at = self.taken_at.isoformat(timespec="seconds")
        self._header = {"format": FORMAT, "kind": kind, "taken_at": taken_at, **facts}
        self._add_json(HEADER, self._header)

    def refuse_too_large(self, size: int, **contents: Any) -> None:
        """Raises BackupError if the reader would refuse the manifest. `size`: bytes of the
        database.
        """
        data = _json({"header": self._header, **contents, "members": []})
        refuse_size(size, besides=len(data))
        try:
            Manifest.read(iter([data.decode()]), self.path.name)
        except ValueError as error:
            raise BackupError(
                f"these backups can't hold everything in the database: {error}"
            ) from error

    def add_rows(self, name: str, rows: Sequence[bytes | bytearray]) -> list[Future[int]]:
        """Add a file of whole COPY rows. Each future gives the number of rows in a piece when that
        has been packed.
        """
        size = sum(map(len, rows))
        if size <= PIECE_BYTES + PIECE_BYTES // 2:
            return [
                self._add(_Piece(name, rows, True, self._tar_header(name, size), padding(size)))
            ]
        return [
            self._add(piece) for piece in self._file_of(name, size, _split(rows), has_rows=True)
        ]

    def add_file(self, name: str, size: int, pieces: Iterable[bytes]) -> None:
        """Add a file of `size` bytes, which come in pieces of PIECE_BYTES."""
        futures: deque[Future[int]] = deque()
        for piece in self._file_of(name, size, ([data] for data in pieces), has_rows=False):
            futures.append(self._add(piece))
            if len(futures) > AHEAD:
                futures.popleft().result()
        for future in futures:
            future.result()

    def finish(self, **contents: Any) -> None:
        """Write the manifest and the trailer, and flush the file to the disk. `contents`: fields of
        the manifest.
        """
        self._packers.shutdown()
        if len(self._members) != self._added:
            raise RuntimeError("a piece failed, but the result of its future was not read")
        rows = sum(table["rows"] for table in contents["tables"])
        members = [{**asdict(member), "sha256": member.sha256.hex()} for member in self._members]
        data = _json({"header": {**self._header, "rows": rows}, **contents, "members": members})
        packed = _pack((self._tar_header(MANIFEST, len(data)), data, padding(len(data)), TAR_END))
        if len(data) > LARGEST_JSON or len(packed) > LARGEST_MANIFEST:
            raise BackupError(TOO_LARGE)
        trailer = Trailer(self._end, len(packed), hashlib.sha256(packed).digest())
        with explained(self.path.parent):
            self._file.write(packed)
            self._file.write(trailer.pack())
            self._file.flush()
            os.fsync(self._file.fileno())

    def _add_json(self, name: str, value: dict[str, Any]) -> None:
        data = _json(value)
        self._add(
            _Piece(name, [data], False, self._tar_header(name, len(data)), padding(len(data)))
        ).result()

    def _file_of(
        self,
        name: str,
        size: int,
        contents: Iterable[Sequence[bytes | bytearray | memoryview]],
        *,
        has_rows: bool,
    ) -> Iterable[_Piece]:
        """The pieces of one file of the archive. The first has the file's header, and the last its
        padding.
        """
        offset = 0
        for content in contents:
            before = b"" if offset else self._tar_header(name, size)
            offset += sum(map(len, content))
            yield _Piece(name, content, has_rows, before, padding(size) if offset == size else b"")

    def _add(self, piece: _Piece) -> Future[int]:
        number = self._added
        self._added += 1
        return self._packers.submit(self._pack, number, piece)

    def _pack(self, number: int, piece: _Piece) -> int:
        """Compress a piece in a thread of the packers, and write all pieces that may be written
        now, in their order.
        """
        raw = b"".join((piece.before, *piece.content, piece.after))
        for content in piece.content:
            if isinstance(content, memoryview):
                content.release()
        size = len(raw) - len(piece.before) - len(piece.after)
        rows = count_rows(raw) if piece.has_rows else None
        packed = _pack((raw,))
        sha256 = hashlib.sha256(packed).digest()
        with self._lock, explained(self.path.parent):
            self._packed[number] = (piece, size, rows, packed, sha256)
            while (ready := self._packed.pop(len(self._members), None)) is not None:
                self._write(*ready)
        return rows or 0

    def _write(
        self, piece: _Piece, size: int, rows: int | None, packed: bytes, sha256: bytes
    ) -> None:
        self._file.write(packed)
        self._members.append(Member(piece.name, self._end, len(packed), sha256, size, rows))
        self._end += len(packed)

    def _tar_header(self, name: str, size: int) -> bytes:
        info = tarfile.TarInfo(name)
        info.size = size
        info.mode = 0o600
        info.mtime = int(self.taken_at.timestamp())
        return info.tobuf(tarfile.GNU_FORMAT)


def refuse_size(size: int, besides: int = 0) -> None:
    """Raises BackupError if the manifest of a database of `size` bytes would be too large.

    `besides`: bytes of the manifest that do not describe gzip members.
    """
    if size // PIECE_BYTES * MEMBER_JSON + besides > LARGEST_JSON:
        raise BackupError(TOO_LARGE)


def _split(chunks: Sequence[bytes | bytearray]) -> Iterator[Sequence[memoryview]]:
    """Split the chunks into lists of at most PIECE_BYTES each, without copying."""
    piece: list[memoryview] = []
    left = PIECE_BYTES
    for chunk in chunks:
        view = memoryview(chunk)
        for start in range(0, len(view), PIECE_BYTES):
            part = view[start : start + PIECE_BYTES]
            if len(part) > left:
                yield piece
                piece, left = [], PIECE_BYTES
            piece.append(part)
            left -= len(part)
    yield piece


def count_rows(data: bytes) -> int:
    """Count line ends: one for each COPY row. A tar header and padding have none. This is faster
    than bytes.count().
    """
    return len(data) - len(data.replace(b"\n", b""))


def _pack(data: Sequence[bytes]) -> bytes:
    isal = igzip()
    packed: bytes = isal.compress(b"".join(data), 1, flag=isal.COMP_GZIP)
    return packed


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"
