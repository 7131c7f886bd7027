"""Finds out by checksums whether two backups have the same bytes, wherever they are stored."""

from __future__ import annotations

import hashlib

from batch_system.backup.file.source import Source
from batch_system.concurrency.stoppable import Stop

PIECE_BYTES = 8 * 1024 * 1024


def sha256(source: Source, stop: Stop) -> str:
    """The SHA-256 of all bytes of the source, in hexadecimal digits."""
    digest = hashlib.sha256()
    for offset in range(0, source.size, PIECE_BYTES):
        stop.check()
        digest.update(source.read(offset, PIECE_BYTES))
    return digest.hexdigest()


def is_same(left: Source, right: Source, stop: Stop) -> bool:
    return left.size == right.size and sha256(left, stop) == sha256(right, stop)
