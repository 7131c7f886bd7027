"""Reads backups: the manifest at the end of the file, then any single gzip member. Each part is
checked before its use.

Nothing in the file is trusted: sizes are checked before memory is allocated, and names are only
compared.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Self

from batch_system.backup.file.format import (
    COPY,
    DATABASE,
    HEADER,
    LARGEST_JSON,
    LARGEST_MANIFEST,
    LARGEST_PIECE,
    MANIFEST,
    SQLITE,
    TAR_END,
    TRAILER_BYTES,
    Trailer,
    padding,
)
from batch_system.backup.file.format import Header as Header
from batch_system.backup.file.format import Member as Member
from batch_system.backup.file.manifest import Manifest, header_of
from batch_system.backup.file.manifest import SavedSequence as SavedSequence
from batch_system.backup.file.manifest import SavedTable as SavedTable
from batch_system.backup.file.source import LocalFile as LocalFile
from batch_system.backup.file.source import Source as Source
from batch_system.backup.file.unpacking import Unpacked, only_file, size_in, text, unpack
from batch_system.backup.file.writer import count_rows
from batch_system.errors import BackupError, DamagedBackup
from batch_system.escaping import brief

FIRST_BYTES = 64 * 1024
LARGEST_HEADER = 4 * 1024 * 1024
"""Bytes from the start of the file that are read for the header: FIRST_BYTES, or else
LARGEST_HEADER.
"""

Name = tuple[str | None, str]


@dataclass(frozen=True)
class Backup:
    """An open backup. Its manifest has been checked against the trailer; each member is checked
    when it is read.
    """

    source: Source
    header: Header
    tables: tuple[SavedTable, ...]
    sequences: tuple[SavedSequence, ...]
    left_out: tuple[str, ...]
    members: tuple[Member, ...]
    _frames: dict[int, tuple[int | None, int]]
    """For each member of a file with several members, by the member's offset: the size of the file
    if the member
    begins with the file's header (else None), and the number of padding bytes at the member's end.
    """
    _by_table: dict[Name, tuple[Member, ...]]
    """PostgreSQL: the members with the rows of a table, by its schema and name, in the order of the
    table.
    """
    manifest_sha256: str
    """SHA-256 of the packed manifest. It covers the hashes of all members, so equal values mean
    equal backups.
    """

    @classmethod
    def open(cls, source: Source) -> Self:
        """Read the manifest. Raises BackupError if the source is no backup, is damaged, or has a
        newer format.
        """
        trailer = _trailer(source)
        try:
            manifest = _manifest(source, trailer)
            frames = _frames(manifest.members, manifest.header.kind, trailer)
            by_table = _by_table(manifest)
        except ValueError as error:
            raise damaged(
                source, f"its manifest is not one that this service writes ({error})"
            ) from error
        return cls(
            source=source,
            header=manifest.header,
            tables=tuple(table for table, _ in manifest.tables),
            sequences=manifest.sequences,
            left_out=manifest.left_out,
            members=manifest.members,
            _frames=frames,
            _by_table=by_table,
            manifest_sha256=trailer.sha256.hex(),
        )

    def parts(self, table: SavedTable) -> Iterator[bytes]:
        """PostgreSQL: the table's rows as COPY wrote them, in the table's order. A part may end
        within a large row.
        """
        return map(self.content, self.members_of(table))

    def members_of(self, table: SavedTable) -> tuple[Member, ...]:
        return self._by_table.get((table.schema, table.name), ())

    def pieces(self) -> Iterator[bytes]:
        """SQLite: the pieces of the database file, from its first byte to its last."""
        for member in self.members:
            if member.name == DATABASE:
                yield self.content(member)

    def content(self, member: Member) -> bytes:
        """The part of a file that this member holds. Raises BackupError if any byte of it differs
        from the manifest.
        """
        size, after = self._frames.get(member.offset) or (member.bytes, len(padding(member.bytes)))
        before = 0 if size is None else tarfile.BLOCKSIZE
        packed = self.source.read(member.offset, member.packed)
        if hashlib.sha256(packed).digest() != member.sha256:
            raise damaged(
                self.source, f"{member.name} is not what was written (at byte {member.offset})"
            )
        raw = unpack(packed, before + member.bytes + after)
        if raw is None:
            raise damaged(self.source, f"{member.name} holds more or less than its manifest says")
        if size is not None and size_in(raw[:before], member.name) != size:
            raise damaged(self.source, f"{member.name} does not begin as its manifest says")
        if after and raw[-after:] != bytes(after):
            raise damaged(self.source, f"{member.name} does not end as its manifest says")
        if member.rows is not None and count_rows(raw) != member.rows:
            raise damaged(
                self.source,
                f"{member.name} does not have the number of rows that its manifest says",
            )
        return raw[before : before + member.bytes] if before or after else raw


def read_header(path: Path) -> Header:
    """The header in the first member. Nothing else of the file is read. Raises BackupError."""
    with LocalFile(path) as file:
        header = first_header(file)
    if header is None:
        raise BackupError(f"{path} is not a backup of this service")
    return header


def damaged(source: Source, cause: str) -> DamagedBackup:
    return DamagedBackup(
        f"the backup {source.name} is damaged: {cause}. Nothing was read from it; use another "
        "backup."
    )


def _trailer(source: Source) -> Trailer:
    trailer = Trailer.unpack(source.read(max(source.size - TRAILER_BYTES, 0), TRAILER_BYTES))
    if trailer is None:
        if first_header(source) is None:  # first_header() also refuses a newer format
            raise DamagedBackup(f"{source.name} is not a backup of this service")
        raise damaged(
            source, "it does not end with a trailer, so its end is missing or more bytes follow it"
        )
    if trailer.offset + trailer.packed + TRAILER_BYTES != source.size:
        raise damaged(source, "there are too few or too many bytes before its trailer")
    return trailer


def _manifest(source: Source, trailer: Trailer) -> Manifest:
    """The manifest. Raises DamagedBackup, or ValueError, which says which field is wrong."""
    if trailer.packed > LARGEST_MANIFEST:
        raise damaged(
            source,
            f"its manifest has {trailer.packed:,} bytes, and {LARGEST_MANIFEST:,} are allowed",
        )
    packed = source.read(trailer.offset, trailer.packed)
    if hashlib.sha256(packed).digest() != trailer.sha256:
        raise damaged(source, "its manifest is not what was written")
    unpacked = Unpacked(packed)
    size = size_in(unpacked.read(tarfile.BLOCKSIZE), MANIFEST)
    if size is None or size > LARGEST_JSON:
        raise damaged(source, "its last member is not a manifest")
    manifest = Manifest.read(text(unpacked, size), source.name)
    rest = padding(size) + TAR_END
    if unpacked.read(len(rest) + 1) != rest or not unpacked.is_whole:
        raise damaged(source, "its last member is not a manifest")
    return manifest


def _parsed(source: Source, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged(source, "its header is not JSON") from error
    if not isinstance(value, dict):
        raise damaged(source, "its header is not a JSON object")
    return value


def first_header(source: Source) -> Header | None:
    """The header in the first member; None if the first member has no file with the name of a
    header.

    Raises BackupError if the header is damaged, or has a newer format.
    """
    starts = (source.read(0, length) for length in (FIRST_BYTES, LARGEST_HEADER))
    members = (unpack(start, LARGEST_HEADER, exactly=False, more_follows=True) for start in starts)
    raw = next(filter(None, members), None)
    data = only_file(raw, HEADER) if raw else None
    if data is None:
        return None
    try:
        return header_of(_parsed(source, data), source.name)
    except ValueError as error:
        raise damaged(
            source, f"its header is not one that this service writes ({error})"
        ) from error


def _frames(
    members: tuple[Member, ...], kind: str, trailer: Trailer
) -> dict[int, tuple[int | None, int]]:
    """The field `_frames` of Backup. Raises ValueError if the members leave gaps, or have invalid
    names or sizes.
    """
    frames: dict[int, tuple[int | None, int]] = {}
    seen: set[str] = set()
    for name, run in groupby(members, key=lambda member: member.name):
        if name in seen or not _is_allowed(name, kind, is_first=not seen):
            raise ValueError(f"a member named {brief(name)!r} is not allowed there")
        seen.add(name)
        pieces = list(run)
        if any((piece.rows is None) == (COPY.fullmatch(name) is not None) for piece in pieces):
            raise ValueError(
                f"only the members of a table have a number of rows, which {name} contradicts"
            )
        if len(pieces) > 1:
            frames |= dict.fromkeys((piece.offset for piece in pieces), (None, 0))
            size = sum(piece.bytes for piece in pieces)
            frames[pieces[0].offset] = (size, 0)
            frames[pieces[-1].offset] = (None, len(padding(size)))
    end = 0
    for member in members:
        if (
            member.offset != end
            or member.bytes > LARGEST_PIECE
            or member.packed > 2 * LARGEST_PIECE
        ):
            raise ValueError(
                f"{member.name} at byte {member.offset}, with {member.bytes} bytes in "
                f"{member.packed}"
            )
        end = member.end
    if end != trailer.offset or not seen or (kind == SQLITE and DATABASE not in seen):
        raise ValueError(f"its members end at byte {end}")
    return frames


def _is_allowed(name: str, kind: str, *, is_first: bool) -> bool:
    if is_first:
        return name == HEADER
    return name == DATABASE if kind == SQLITE else COPY.fullmatch(name) is not None


def _by_table(manifest: Manifest) -> dict[Name, tuple[Member, ...]]:
    """The field `_by_table` of Backup. Raises ValueError if the members hold other rows than the
    tables.
    """
    folders: dict[str, list[Member]] = {}
    for member in manifest.members:
        if match := COPY.fullmatch(member.name):
            folders.setdefault(match[1], []).append(member)
    by_table: dict[Name, tuple[Member, ...]] = {}
    for table, folder in manifest.tables:
        members = folders.pop(folder, []) if folder is not None else []
        sums = (
            sum(member.rows or 0 for member in members),
            sum(member.bytes for member in members),
        )
        if folder is not None and (table.rows, table.bytes) != sums:
            raise ValueError(f"the members of {brief(table.name)} hold other rows than the table")
        if members:
            by_table[table.schema, table.name] = tuple(sorted(members, key=_part_number))
    if folders:
        raise ValueError(f"it holds rows of no table of its manifest: {next(iter(folders))}")
    return by_table


def _part_number(member: Member) -> int:
    """The number of the part that the member belongs to. Several members of one part have the same
    number.
    """
    return int(member.name.rpartition("/")[2].removesuffix(".copy"))
