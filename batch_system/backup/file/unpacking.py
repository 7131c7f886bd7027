"""Unpacks gzip members and the tar headers in them. Memory is bounded whatever a member claims
about its size.
"""

from __future__ import annotations

import codecs
import tarfile
from collections.abc import Iterator

from batch_system.backup.file.format import padding
from batch_system.backup.file.igzip import igzip

AT_ONCE = 64 * 1024
"""Bytes that are unpacked at once, packed or unpacked, where the whole content need not be in
memory.
"""


class Unpacked:
    """Reads the content of one gzip member piece by piece."""

    def __init__(self, packed: bytes) -> None:
        self._packed = memoryview(packed)
        isal = igzip()
        self._damage = isal.IsalError
        self._unpacker = isal.IgzipDecompressor(flag=isal.DECOMP_GZIP)

    @property
    def is_whole(self) -> bool:
        return self._unpacker.eof and not self._packed and not self._unpacker.unused_data

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end of the member, or before damaged data."""
        content = bytearray()
        while len(content) < size and not self._unpacker.eof:
            packed = self._packed[: AT_ONCE if self._unpacker.needs_input else 0]
            self._packed = self._packed[len(packed) :]
            try:
                raw = self._unpacker.decompress(packed, size - len(content))
            except self._damage:
                break
            if not raw and not self._packed:
                break
            content += raw
        return bytes(content)


def text(unpacked: Unpacked, size: int) -> Iterator[str]:
    """The next `size` bytes as text, in pieces. Raises UnicodeDecodeError, which is a
    ValueError.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, size, AT_ONCE):
        length = min(AT_ONCE, size - start)
        yield decoder.decode(unpacked.read(length), final=start + length == size)


def unpack(
    packed: bytes, size: int, *, exactly: bool = True, more_follows: bool = False
) -> bytes | None:
    """The content of one gzip member; None if it is damaged, or its size is wrong. Memory is
    bounded by `size`.

    `exactly`: whether the content must have `size` bytes, or at most that many. `more_follows`:
    whether other bytes may follow the member.
    """
    isal = igzip()
    unpacker = isal.IgzipDecompressor(flag=isal.DECOMP_GZIP)
    try:
        raw: bytes = unpacker.decompress(packed, size + 1)
    except isal.IsalError:
        return None
    if not unpacker.eof or (unpacker.unused_data and not more_follows):
        return None
    return raw if len(raw) == size or (not exactly and len(raw) <= size) else None


def only_file(raw: bytes, name: str, end: bytes = b"") -> bytes | None:
    """The content of the archive's file `name`, if `raw` is exactly that file and then `end`; else
    None.
    """
    block = tarfile.BLOCKSIZE
    size = size_in(raw[:block], name)
    if size is None or raw[block + size :] != padding(size) + end:
        return None
    return raw[block : block + size]


def size_in(block: bytes, name: str) -> int | None:
    """The size in a tar header; None if the block is not the header of a regular file with this
    name.
    """
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.TarError, ValueError):
        return None
    return info.size if info.isreg() and info.name == name else None
