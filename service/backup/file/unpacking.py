"""What gzip members hold: a tar's file each, unpacked with a bound, whatever they claim to be."""

from __future__ import annotations

import codecs
import tarfile
from collections.abc import Iterator
from typing import cast

from isal import igzip_lib

from service.backup.file.format import padding

AT_ONCE = 64 * 1024
"""Bytes that are taken in and given out at once, where the whole need not be in memory."""

_IsalError = cast(type[Exception], igzip_lib.IsalError)  # isal's own types are wrong here


class Unpacked:
    """The content of one gzip member, a little at a time."""

    def __init__(self, packed: bytes) -> None:
        self._packed = memoryview(packed)
        self._unpacker = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)

    @property
    def is_whole(self) -> bool:
        return self._unpacker.eof and not self._packed and not self._unpacker.unused_data

    def read(self, size: int) -> bytes:
        """Fewer bytes at the end, and where what follows is damaged."""
        found = bytearray()
        while len(found) < size and not self._unpacker.eof:
            taken = self._packed[: AT_ONCE if self._unpacker.needs_input else 0]
            self._packed = self._packed[len(taken) :]
            try:
                raw = self._unpacker.decompress(taken, size - len(found))
            except _IsalError:
                break
            if not raw and not self._packed:
                break
            found += raw
        return bytes(found)


def text(unpacked: Unpacked, size: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, size, AT_ONCE):
        wanted = min(AT_ONCE, size - start)
        yield decoder.decode(unpacked.read(wanted), final=start + wanted == size)


def unpack(packed: bytes, size: int, *, exactly: bool = True, more_follows: bool = False) -> bytes | None:
    """The content of one gzip member, of this size (or at most so large): never more than that takes memory."""
    unpacker = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
    try:
        raw: bytes = unpacker.decompress(packed, size + 1)
    except _IsalError:
        return None
    if not unpacker.eof or (unpacker.unused_data and not more_follows):
        return None
    return raw if len(raw) == size or (not exactly and len(raw) <= size) else None


def only_file(raw: bytes, name: str, end: bytes = b"") -> bytes | None:
    """The content of the tar's file with which a member begins and ends; None where it is not exactly that."""
    block = tarfile.BLOCKSIZE
    size = size_in(raw[:block], name)
    if size is None or raw[block + size :] != padding(size) + end:
        return None
    return raw[block : block + size]


def size_in(block: bytes, name: str) -> int | None:
    """The size that a tar's header tells; None where it is not that of a file of this name."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.TarError, ValueError):
        return None
    return info.size if info.isreg() and info.name == name else None
