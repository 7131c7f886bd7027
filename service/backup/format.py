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
from typing import Any, Self

from service.errors import BackupError

FORMAT = 1
PIECE_BYTES = 2 * 1024 * 1024
"""The content of one gzip member: so much when written, at most twice as much when read."""
LARGEST_PIECE = 2 * PIECE_BYTES
LARGEST_JSON = 64 * 1024 * 1024

HEADER, MANIFEST, DATABASE = "header.json", "manifest.json", "database.sqlite3"
COPY = re.compile(r"(data/[0-9]{4,}-[^/]+)/([0-9]{4,})\.copy")
"""A part of a table's rows: its folder, and its number. The numbers are in the table's order, the file need not be."""
TAR_END = bytes(2 * tarfile.BLOCKSIZE)

POSTGRESQL, SQLITE = "postgresql", "sqlite"
WORDS = {POSTGRESQL: "PostgreSQL", SQLITE: "SQLite"}
"""The kinds of databases, for people."""
PACKAGE = "batch-system"


@dataclass(frozen=True, slots=True)
class Member:
    """A gzip member: `packed` bytes at `offset`, which hold `bytes` of the tar's file `name`, and end so many rows."""

    name: str
    offset: int
    packed: int
    sha256: str
    bytes: int
    rows: int | None

    @property
    def end(self) -> int:
        return self.offset + self.packed


@dataclass(frozen=True)
class Header:
    """What somebody who lists backups wants to know. `rows` is known to the manifest only."""

    format: int
    kind: str
    taken_at: datetime
    database: str
    server_version: str
    revision: str | None
    revisions: dict[str, str]
    tool: str
    rows: int | None = None

    @classmethod
    def of(cls, facts: dict[str, Any], source: str) -> Self:
        """Raises BackupError for a newer format, and ValueError, KeyError or TypeError for what is no header."""
        if facts["format"] != FORMAT:
            raise BackupError(
                f"the backup {source} was made by a newer version of this service: it has format {facts['format']}, "
                f"and this version knows formats up to {FORMAT}. Use the newer version."
            )
        taken_at = datetime.fromisoformat(facts["taken_at"])
        if facts["kind"] not in (POSTGRESQL, SQLITE) or taken_at.tzinfo is None:
            raise ValueError(f"a backup of {facts['kind']!r}, taken at {taken_at}")
        revisions = {str(table): str(revision) for table, revision in facts["revisions"].items()}
        names = ("format", "kind", "database", "server_version", "revision", "tool", "rows")
        values: dict[str, Any] = {name: facts.get(name) for name in names}
        if not all(isinstance(values[name], str) for name in ("database", "server_version", "tool")):
            raise ValueError("a header without the names of database, server and tool")
        return cls(taken_at=taken_at, revisions=revisions, **values)


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
