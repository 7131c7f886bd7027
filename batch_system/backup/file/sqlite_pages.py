"""Checks the bytes of a SQLite file before SQLite opens it, because SQLite then reads the whole
schema into memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAGIC = b"SQLite format 3\0"
HEADER_BYTES = 100
MOST_OBJECTS = 20_000
MOST_SCHEMA_BYTES = 4 * 1024 * 1024
"""Limits for a file from elsewhere: number of its tables, indexes, views and triggers, and bytes of
their text.
"""

_INTERIOR, _LEAF = 5, 13
_VARINT_BYTES = 9


@dataclass(frozen=True)
class Layout:
    """Page size in bytes, and number of pages. `pages` is None for files that SQLite before 3.7
    wrote last.
    """

    page_size: int
    pages: int | None

    def refuse_another_size(self, size: int) -> None:
        """Raises ValueError unless a file with this layout can have `size` bytes."""
        pages, rest = divmod(size, self.page_size)
        if rest or pages == 0 or self.pages not in (pages, None):
            number = "some" if self.pages is None else f"{self.pages:,}"
            raise ValueError(
                f"it has {size:,} bytes, but {number} pages of {self.page_size:,} bytes"
            )


def layout(first: bytes) -> Layout:
    """The layout in the file's first bytes. Raises ValueError if they are not the header of a
    SQLite database.
    """
    if len(first) < HEADER_BYTES or not first.startswith(MAGIC):
        raise ValueError("it does not begin as a SQLite database does")
    page_size = _number(first, 16, 2)
    page_size = 65536 if page_size == 1 else page_size
    if page_size < 512 or page_size & (page_size - 1):
        raise ValueError(
            f"its header gives pages of {page_size:,} bytes, which SQLite does not allow"
        )
    is_known = first[24:28] == first[92:96]
    return Layout(page_size, (_number(first, 28, 4) or None) if is_known else None)


def refuse_large_schema(path: Path, page_size: int) -> None:
    """Raises ValueError if the schema exceeds the limits above, or its pages do not form a tree."""
    objects = text = 0
    pending, visited = [1], set[int]()
    with path.open("rb") as file:
        while pending:
            number = pending.pop()
            if number in visited or number == 0:
                raise ValueError("the pages of its schema do not form a tree")
            visited.add(number)
            page = _page(file, number, page_size)
            start = HEADER_BYTES if number == 1 else 0
            if page[start] == _INTERIOR:
                pending += [
                    _number(page, cell, 4) for cell in [*_cells(page, start, 12), start + 8]
                ]
            else:
                sizes = [_varint(page, cell) for cell in _cells(page, start, 8)]
                objects, text = objects + len(sizes), text + sum(sizes)
            if max(objects, len(visited)) > MOST_OBJECTS or text > MOST_SCHEMA_BYTES:
                raise ValueError(
                    f"its schema has more than {MOST_OBJECTS:,} tables, indexes, views and "
                    f"triggers, or their text has more than {MOST_SCHEMA_BYTES:,} bytes"
                )


def _page(file: BinaryIO, number: int, page_size: int) -> bytes:
    file.seek((number - 1) * page_size)
    page = file.read(page_size)
    if len(page) < page_size or page[HEADER_BYTES if number == 1 else 0] not in (_INTERIOR, _LEAF):
        raise ValueError("the pages of its schema do not form a tree")
    return page


def _cells(page: bytes, start: int, header: int) -> list[int]:
    """The offsets of the cells of a page. Its header begins at `start`, and has `header` bytes."""
    first = start + header
    return [
        _number(page, pointer, 2)
        for pointer in range(first, first + 2 * _number(page, start + 3, 2), 2)
    ]


def _varint(page: bytes, offset: int) -> int:
    value = 0
    for count, byte in enumerate(page[offset : offset + _VARINT_BYTES], 1):
        if count == _VARINT_BYTES:
            return value << 8 | byte
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            break
    return value


def _number(data: bytes, offset: int, length: int) -> int:
    return int.from_bytes(data[offset : offset + length], "big")
