"""Reads a backup and compares it with its own checksums. It restores nothing."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from isal import igzip, isal_zlib

from service.backup.archive import COPY_SUFFIX, FORMAT, HEADER, MANIFEST, TAR_END
from service.backup.threads import Stop
from service.errors import BackupError

PIECE_BYTES = 1024 * 1024

# isal's own types are missing for the one, and wrong for the other.
_open: Callable[[Path, str], BinaryIO] = igzip.open
_IsalError = cast(type[Exception], isal_zlib.error)


def verify(path: Path, stop: Stop) -> None:
    """Raises BackupError when a byte is not what was written.

    gzip's checksum finds flipped bytes and a cut tail; a gzip member that is missing, doubled or at the wrong
    place only the manifest finds.
    """
    try:
        with _open(path, "rb") as stream:
            _compare(stream, stop)
    except (EOFError, ValueError, KeyError, igzip.BadGzipFile, _IsalError, tarfile.TarError) as error:
        raise BackupError(
            f"the backup {path} can't be read back ({error}): the disk may be faulty. Look at it, or set BACKUP_DIR "
            "to another one."
        ) from error


def _compare(stream: BinaryIO, stop: Stop) -> None:
    seen = []
    for info in _members(stream):
        if info.name == MANIFEST:
            manifest = json.loads(_exactly(stream, info.size + -info.size % tarfile.BLOCKSIZE)[: info.size])
            break
        seen.append(_measure(stream, info, stop))
    else:
        raise ValueError("it has no manifest")
    if stream.read() != TAR_END:
        raise ValueError("something stands after its manifest")
    if manifest["format"] != FORMAT or not seen or seen[0]["name"] != HEADER or seen[1:] != manifest["members"]:
        raise ValueError("its parts are not those that its manifest names")


def _members(stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The tar's headers. Read here rather than by tarfile, which reads ahead and ignores what follows the end."""
    while (block := _exactly(stream, tarfile.BLOCKSIZE)).strip(b"\0"):
        yield tarfile.TarInfo.frombuf(block, "utf-8", "strict")


def _measure(stream: BinaryIO, info: tarfile.TarInfo, stop: Stop) -> dict[str, Any]:
    """What the manifest should say about this member."""
    digest, rows, left = hashlib.sha256(), 0, info.size
    while left:
        stop.check()
        piece = _exactly(stream, min(left, PIECE_BYTES))
        digest.update(piece)
        rows += piece.count(b"\n") if info.name.endswith(COPY_SUFFIX) else 0
        left -= len(piece)
    _exactly(stream, -info.size % tarfile.BLOCKSIZE)
    measured = {"name": info.name, "bytes": info.size, "sha256": digest.hexdigest()}
    return {**measured, "rows": rows} if info.name.endswith(COPY_SUFFIX) else measured


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError("it ends too early")
    return data
