"""The parts of a backup's file, as its writer and its reader use them.

The file is a sequence of gzip members, each of which can be read by itself; unpacked and joined,
they are a tar archive. The trailer stands after the end of the archive: an empty gzip member whose
extra field gives the place of the manifest.
"""

from __future__ import annotations

import re
import struct
import tarfile
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field

from batch_system.errors import BackupError
from batch_system.escaping import brief

FORMAT = 1
PIECE_BYTES = 2 * 1024 * 1024
"""Bytes of content that the writer puts into one gzip member. The reader accepts up to
LARGEST_PIECE.
"""
LARGEST_PIECE = 2 * PIECE_BYTES
LARGEST_JSON = 64 * 1024 * 1024
LARGEST_MANIFEST = 24 * 1024 * 1024
"""The manifest's largest size in bytes: LARGEST_JSON unpacked, LARGEST_MANIFEST packed."""
MEMBER_JSON = 200
"""Approximate bytes of the manifest that describe one gzip member."""

HEADER, MANIFEST, DATABASE = "header.json", "manifest.json", "database.sqlite3"
_NUMBER = "(?:[0-9]{4}|[1-9][0-9]{4,11})"
FOLDER = rf"data/{_NUMBER}-[A-Za-z0-9_.~%-]{{1,60}}"
COPY = re.compile(rf"({FOLDER})/({_NUMBER})\.copy")
"""Name of a part of a table's rows: the table's folder and the part's number.

The numbers follow the order of the table. The parts may stand in the file in another order.
"""
TAR_END = bytes(2 * tarfile.BLOCKSIZE)

POSTGRESQL, SQLITE = "postgresql", "sqlite"
WORDS = {POSTGRESQL: "PostgreSQL", SQLITE: "SQLite"}
"""The kinds of databases, as messages name them."""
PACKAGE = "batch-system"

LONGEST_TEXT = 10_000
"""Largest number of characters of a name or a type. Names have at most 63 bytes in PostgreSQL;
SQLite allows more.
"""
LARGEST_NUMBER = 2**63 - 1
YEARS = range(1970, 9000)
MOST_REVISIONS = 50_000


def _without_nul(text: str) -> str:
    """Refuse a NUL, which no database allows in a name. Other control characters are allowed, such
    as line ends.
    """
    if "\0" in text:
        raise ValueError("a name must not contain a NUL")
    return text


def _digest(value: Any) -> bytes:
    if not isinstance(value, str) or re.fullmatch("[0-9a-f]{64}", value) is None:
        raise ValueError("it is not a SHA-256 in hexadecimal digits")
    return bytes.fromhex(value)


def _instant(value: Any) -> datetime:
    try:
        at = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise ValueError("it is not an instant in ISO 8601") from None
    if at.tzinfo is None or at.year not in YEARS:
        raise ValueError(
            f"it is not an instant with an offset between the years {YEARS.start} and {YEARS.stop}"
        )
    return at


def _by_table(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MOST_REVISIONS:
        raise ValueError(f"it is not an object with at most {MOST_REVISIONS:,} keys")
    if not all(
        isinstance(text, str) and len(text) <= LONGEST_TEXT for text in (*value, *value.values())
    ):
        raise ValueError(
            f"its names and revisions must be strings of at most {LONGEST_TEXT:,} characters"
        )
    return value


Text = Annotated[str, Field(strict=True, max_length=LONGEST_TEXT), AfterValidator(_without_nul)]
Number = Annotated[int, Field(strict=True, ge=0, le=LARGEST_NUMBER)]
Digest = Annotated[bytes, BeforeValidator(_digest)]


@dataclass(frozen=True, slots=True)
class Member:
    """A gzip member: `packed` bytes of the backup at `offset`, which hold `bytes` bytes of the
    archive's file `name`.

    `rows`: how many rows of a table end in it; None for a file without rows.
    """

    name: Annotated[str, Field(strict=True, max_length=100)]
    offset: Number
    packed: Number
    sha256: Digest
    bytes: Number
    rows: Number | None

    @property
    def end(self) -> int:
        return self.offset + self.packed


@dataclass(frozen=True)
class Header:
    """Describes a backup for lists of backups. Only the manifest's copy of the header has
    `rows`.
    """

    format: Annotated[int, Field(strict=True, ge=1)]
    kind: Literal["postgresql", "sqlite"]
    taken_at: Annotated[datetime, BeforeValidator(_instant)]
    database: Text
    server_version: Text
    revision: Text | None
    revisions: Annotated[dict[Text, Text], BeforeValidator(_by_table)]
    tool: Text
    rows: Number | None = None

    @staticmethod
    def refuse_newer(facts: Any, source: str) -> None:
        """Raises BackupError if the header has a newer format. Its other fields are not read."""
        number = facts.get("format") if isinstance(facts, dict) else None
        if type(number) is int and number > FORMAT:
            raise BackupError(
                f"the backup {source} was made by a newer version of this service: it has format "
                f"{brief(str(number))}, "
                f"and this version knows formats up to {FORMAT}. Use the newer version."
            )


@dataclass(frozen=True)
class Trailer:
    """The last bytes of the file: place and SHA-256 of the packed manifest."""

    offset: int
    packed: int
    sha256: bytes

    def pack(self) -> bytes:
        return _START + struct.pack(_FACTS, self.offset, self.packed, self.sha256) + _EMPTY

    @classmethod
    def unpack(cls, data: bytes) -> Self | None:
        """The trailer; None if the data is not exactly a trailer."""
        if len(data) != TRAILER_BYTES or not data.startswith(_START) or not data.endswith(_EMPTY):
            return None
        return cls(*struct.unpack_from(_FACTS, data, len(_START)))


_FACTS = "<QQ32s"
_START = struct.pack(
    "<4sLBBHccH",
    b"\x1f\x8b\x08\x04",
    0,
    0,
    255,
    struct.calcsize(_FACTS) + 4,
    b"B",
    b"k",
    struct.calcsize(_FACTS),
)
_EMPTY = b"\x03\x00" + bytes(8)
TRAILER_BYTES = len(_START) + struct.calcsize(_FACTS) + len(_EMPTY)


def padding(size: int) -> bytes:
    """The zero bytes that follow a file of this size in a tar archive."""
    return bytes(-size % tarfile.BLOCKSIZE)


def tool() -> str:
    """Name and version of this package, for the headers of backups."""
    try:
        return f"{PACKAGE} {version(PACKAGE)}"
    except PackageNotFoundError:  # the package runs from its source, and is not installed
        return PACKAGE
