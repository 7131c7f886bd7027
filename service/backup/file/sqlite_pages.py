"""What the bytes of a SQLite file say, before SQLite opens it: it reads the whole schema into memory when it does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAGIC = b"SQLite format 3\0"
HEADER_BYTES = 100
MOST_OBJECTS = 20_000
MOST_SCHEMA_BYTES = 4 * 1024 * 1024
"""So many tables, indexes, views and triggers, and so much text of them, may a file have that others made."""

_INTERIOR, _LEAF = 5, 13
_VARINT_BYTES = 9


@dataclass(frozen=True)
class Layout:
    """`pages` is None in files of SQLite before 3.7, which does not say it."""

    page_size: int
    pages: int | None

    def refuse_another_size(self, size: int) -> None:
        """Raises ValueError unless a file of this layout has so many bytes."""
        pages, rest = divmod(size, self.page_size)
        if rest or pages == 0 or self.pages not in (pages, None):
            said = "some" if self.pages is None else f"{self.pages:,}"
            raise ValueError(f"it has {size:,} bytes, but {said} pages of {self.page_size:,} bytes")


def layout(first: bytes) -> Layout:
    """`first`: the file's first bytes. Raises ValueError where no SQLite database begins like that."""
    if len(first) < HEADER_BYTES or not first.startswith(MAGIC):
        raise ValueError("it does not begin as a SQLite database does")
    page_size = _number(first, 16, 2)
    page_size = 65536 if page_size == 1 else page_size
    if page_size < 512 or page_size & (page_size - 1):
        raise ValueError(f"it says that its pages have {page_size:,} bytes")
    is_known = first[24:28] == first[92:96]
    return Layout(page_size, (_number(first, 28, 4) or None) if is_known else None)


def refuse_large_schema(path: Path, page_size: int) -> None:
    """Raises ValueError where the schema is larger than memory should be given for, or its pages are no tree."""
    objects = text = 0
    waiting, seen = [1], set[int]()
    with path.open("rb") as file:
        while waiting:
            number = waiting.pop()
            if number in seen or number == 0:
                raise ValueError("the pages of its schema are no tree")
            seen.add(number)
            page = _page(file, number, page_size)
            start = HEADER_BYTES if number == 1 else 0
            if page[start] == _INTERIOR:
                waiting += [_number(page, cell, 4) for cell in [*_cells(page, start, 12), start + 8]]
            else:
                sizes = [_varint(page, cell) for cell in _cells(page, start, 8)]
                objects, text = objects + len(sizes), text + sum(sizes)
            if max(objects, len(seen)) > MOST_OBJECTS or text > MOST_SCHEMA_BYTES:
                raise ValueError(
                    f"its schema has more than {MOST_OBJECTS:,} tables, indexes, views and triggers, or more than "
                    f"{MOST_SCHEMA_BYTES:,} bytes of them"
                )


def _page(file: BinaryIO, number: int, page_size: int) -> bytes:
    file.seek((number - 1) * page_size)
    page = file.read(page_size)
    if len(page) < page_size or page[HEADER_BYTES if number == 1 else 0] not in (_INTERIOR, _LEAF):
        raise ValueError("the pages of its schema are no tree")
    return page


def _cells(page: bytes, start: int, header: int) -> list[int]:
    """Where the cells of a page begin. `header`: so long is what stands before their places."""
    first = start + header
    return [_number(page, place, 2) for place in range(first, first + 2 * _number(page, start + 3, 2), 2)]


def _varint(page: bytes, at: int) -> int:
    value = 0
    for place, byte in enumerate(page[at : at + _VARINT_BYTES], 1):
        if place == _VARINT_BYTES:
            return value << 8 | byte
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            break
    return value


def _number(data: bytes, at: int, length: int) -> int:
    return int.from_bytes(data[at : at + length], "big")
