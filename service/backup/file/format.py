"""What a backup's file is made of, for those who write it and those who read it.

Gzip members one after the other, each of which can be read by itself: together they are a tar. After the tar's end
comes the trailer, a gzip member of nothing, whose extra field says where the manifest is.
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

from service.errors import BackupError
from service.escaping import brief

FORMAT = 1
PIECE_BYTES = 2 * 1024 * 1024
"""The content of one gzip member: so much when written, at most twice as much when read."""
LARGEST_PIECE = 2 * PIECE_BYTES
LARGEST_JSON = 64 * 1024 * 1024
LARGEST_MANIFEST = 24 * 1024 * 1024
"""The manifest's bytes, unpacked and packed."""
MEMBER_JSON = 200
"""About what the manifest says of each piece, in bytes."""

HEADER, MANIFEST, DATABASE = "header.json", "manifest.json", "database.sqlite3"
_NUMBER = "(?:[0-9]{4}|[1-9][0-9]{4,11})"
FOLDER = rf"data/{_NUMBER}-[A-Za-z0-9_.~%-]{{1,60}}"
COPY = re.compile(rf"({FOLDER})/({_NUMBER})\.copy")
"""A part of a table's rows: its folder, and its number. The numbers are in the table's order, the file need not be."""
TAR_END = bytes(2 * tarfile.BLOCKSIZE)

POSTGRESQL, SQLITE = "postgresql", "sqlite"
WORDS = {POSTGRESQL: "PostgreSQL", SQLITE: "SQLite"}
"""The kinds of databases, for people."""
PACKAGE = "batch-system"

LONGEST_TEXT = 10_000
"""Characters of a name or a type. PostgreSQL's have 63 bytes, SQLite's may be longer."""
LARGEST_NUMBER = 2**63 - 1
YEARS = range(1970, 9000)
MOST_REVISIONS = 50_000


def _without_nul(text: str) -> str:
    """No database has that in a name; all else, also an end of a line, may be there."""
    if "\0" in text:
        raise ValueError("a name can't have a NUL in it")
    return text


def _digest(value: Any) -> bytes:
    if not isinstance(value, str) or re.fullmatch("[0-9a-f]{64}", value) is None:
        raise ValueError("it is no SHA-256 in hexadecimal digits")
    return bytes.fromhex(value)


def _instant(value: Any) -> datetime:
    try:
        at = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise ValueError("it is no instant in ISO 8601") from None
    if at.tzinfo is None or at.year not in YEARS:
        raise ValueError(f"it is no instant with an offset between the years {YEARS.start} and {YEARS.stop}")
    return at


def _by_table(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MOST_REVISIONS:
        raise ValueError(f"it is no object with at most {MOST_REVISIONS:,} keys")
    if not all(isinstance(text, str) and len(text) <= LONGEST_TEXT for text in (*value, *value.values())):
        raise ValueError(f"it has something else than names and revisions of at most {LONGEST_TEXT:,} characters")
    return value


Text = Annotated[str, Field(strict=True, max_length=LONGEST_TEXT), AfterValidator(_without_nul)]
Number = Annotated[int, Field(strict=True, ge=0, le=LARGEST_NUMBER)]
Digest = Annotated[bytes, BeforeValidator(_digest)]


@dataclass(frozen=True, slots=True)
class Member:
    """A gzip member: `packed` bytes at `offset`, which hold `bytes` of the tar's file `name`, and end so many rows."""

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
    """What somebody who lists backups wants to know. `rows` is known to the manifest only."""

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
        """Raises BackupError for a header of a later format, whatever else it has."""
        found = facts.get("format") if isinstance(facts, dict) else None
        if type(found) is int and found > FORMAT:
            raise BackupError(
                f"the backup {source} was made by a newer version of this service: it has format {brief(str(found))}, "
                f"and this version knows formats up to {FORMAT}. Use the newer version."
            )


@dataclass(frozen=True)
class Trailer:
    """The file's last bytes: where the manifest is, and what its packed bytes hash to."""

    offset: int
    packed: int
    sha256: bytes

    def pack(self) -> bytes:
        return _START + struct.pack(_FACTS, self.offset, self.packed, self.sha256) + _NOTHING

    @classmethod
    def unpack(cls, data: bytes) -> Self | None:
        """None where not exactly a trailer stands."""
        if len(data) != TRAILER_BYTES or not data.startswith(_START) or not data.endswith(_NOTHING):
            return None
        return cls(*struct.unpack_from(_FACTS, data, len(_START)))


_FACTS = "<QQ32s"
_START = struct.pack(
    "<4sLBBHccH", b"\x1f\x8b\x08\x04", 0, 0, 255, struct.calcsize(_FACTS) + 4, b"B", b"k", struct.calcsize(_FACTS)
)
_NOTHING = b"\x03\x00" + bytes(8)
TRAILER_BYTES = len(_START) + struct.calcsize(_FACTS) + len(_NOTHING)


def padding(size: int) -> bytes:
    """What a tar puts after a file of this size."""
    return bytes(-size % tarfile.BLOCKSIZE)


def tool() -> str:
    """What makes backups here, for their headers."""
    try:
        return f"{PACKAGE} {version(PACKAGE)}"
    except PackageNotFoundError:  # run from its source
        return PACKAGE
