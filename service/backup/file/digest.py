"""Whether two backups are the same, byte by byte, wherever they are."""

from __future__ import annotations

import hashlib

from service.backup.file.source import Source
from service.concurrency.stoppable import Stop

PIECE_BYTES = 8 * 1024 * 1024


def sha256(source: Source, stop: Stop) -> str:
    """Of all of it, read anew."""
    digest = hashlib.sha256()
    for offset in range(0, source.size, PIECE_BYTES):
        stop.check()
        digest.update(source.read(offset, PIECE_BYTES))
    return digest.hexdigest()


def is_same(one: Source, other: Source, stop: Stop) -> bool:
    return one.size == other.size and sha256(one, stop) == sha256(other, stop)
