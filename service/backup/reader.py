"""Reads backups: the manifest from the end of the file, then any member by itself, each checked before it is used.

Nothing that a file says is believed: sizes are bounded before memory is taken, and names are only ever compared.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Self, cast

from isal import isal_zlib

from service.backup.archive import count_rows
from service.backup.format import (
    COPY,
    DATABASE,
    HEADER,
    LARGEST_JSON,
    LARGEST_PIECE,
    MANIFEST,
    SQLITE,
    TAR_END,
    TRAILER_BYTES,
    Trailer,
    padding,
)
from service.backup.format import Header as Header
from service.backup.format import Member as Member
from service.backup.source import LocalFile as LocalFile
from service.backup.source import Source as Source
from service.errors import BackupError, DamagedBackup

FIRST_BYTES = 64 * 1024
LARGEST_HEADER = 4 * 1024 * 1024
"""The header is looked for in so many bytes of the file, and if that is not all of it, in so many."""

_IsalError = cast(type[Exception], isal_zlib.error)  # isal's own types are wrong here


@dataclass(frozen=True)
class SavedTable:
    """A table in a backup. `columns` are those that are not generated; `members` hold its rows (PostgreSQL)."""

    schema: str | None
    name: str
    columns: tuple[str, ...]
    types: tuple[str, ...]
    key: tuple[str, ...]
    rows: int
    bytes: int
    members: tuple[Member, ...] = ()

    def __str__(self) -> str:
        return self.name if self.schema is None else f"{self.schema}.{self.name}"


@dataclass(frozen=True)
class SavedSequence:
    schema: str
    name: str
    last_value: int
    is_called: bool

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


@dataclass(frozen=True)
class Backup:
    """An open backup. Its manifest was compared with the trailer; its members are compared when they are read."""

    source: Source
    header: Header
    tables: tuple[SavedTable, ...]
    sequences: tuple[SavedSequence, ...]
    left_out: tuple[str, ...]
    members: tuple[Member, ...]
    _frames: dict[int, tuple[int | None, int]]
    """By offset: the size of the tar's file whose header stands before this member, and the padding after it."""
    manifest_sha256: str
    """Of the manifest as it is packed. It has the hash of each member: two backups with the same one are the same."""

    @classmethod
    def open(cls, source: Source) -> Self:
        """Raises BackupError for what is no backup, is cut, has a damaged manifest, or comes from a newer version."""
        trailer = _trailer(source)
        manifest = _manifest(source, trailer)
        try:
            header = Header.of(manifest["header"], source.name)
            members = tuple(map(_member, manifest["members"]))
            frames = _frames(members, header.kind, trailer)
            by_folder = _by_folder(members)
            tables = tuple(_table(facts, by_folder) for facts in manifest["tables"])
            sequences = tuple(map(_sequence, manifest["sequences"]))
            left_out = tuple(map(str, manifest["left_out"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(source, f"its manifest is not one that this service writes ({error})") from error
        if by_folder:
            raise damaged(source, f"it holds rows of no table of its manifest: {next(iter(by_folder))}")
        return cls(source, header, tables, sequences, left_out, members, frames, trailer.sha256.hex())

    def parts(self, table: SavedTable) -> Iterator[bytes]:
        """The table's rows as COPY wrote them, some whole rows at a time, in the order of the table's pages."""
        for _, members in groupby(table.members, key=lambda member: member.name):
            pieces = [self.content(member) for member in members]
            yield pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def pieces(self) -> Iterator[bytes]:
        """SQLite: the database file, from its first byte to its last."""
        for member in self.members:
            if member.name == DATABASE:
                yield self.content(member)

    def content(self, member: Member) -> bytes:
        """What this member holds of the tar's file, once every byte of it was compared with the manifest."""
        size, after = self._frames[member.offset]
        before = 0 if size is None else tarfile.BLOCKSIZE
        packed = self.source.read(member.offset, member.packed)
        if hashlib.sha256(packed).hexdigest() != member.sha256:
            raise damaged(self.source, f"{member.name} is not what was written (at byte {member.offset})")
        raw = _unpack(packed, before + member.bytes + after)
        if raw is None:
            raise damaged(self.source, f"{member.name} holds more or less than its manifest says")
        if size is not None and _size_in(raw[:before], member.name) != size:
            raise damaged(self.source, f"{member.name} does not begin as its manifest says")
        if after and raw[-after:] != bytes(after):
            raise damaged(self.source, f"{member.name} does not end as its manifest says")
        if member.rows is not None and count_rows(raw) != member.rows:
            raise damaged(self.source, f"{member.name} has not the rows that its manifest counts")
        return raw[before : before + member.bytes] if before or after else raw


def read_header(path: Path) -> Header:
    """What the first member says, and nothing else of the file is read."""
    with LocalFile(path) as file:
        header = first_header(file)
    if header is None:
        raise BackupError(f"{path} is not a backup of this service")
    return header


def damaged(source: Source, what: str) -> DamagedBackup:
    return DamagedBackup(f"the backup {source.name} is damaged: {what}. Nothing was read from it; use another backup.")


def _trailer(source: Source) -> Trailer:
    trailer = Trailer.unpack(source.read(max(source.size - TRAILER_BYTES, 0), TRAILER_BYTES))
    if trailer is None:
        if first_header(source) is None:  # which also refuses a newer format
            raise DamagedBackup(f"{source.name} is not a backup of this service")
        raise damaged(source, "it does not end with a trailer, so its end is missing or something stands after it")
    if trailer.offset + trailer.packed + TRAILER_BYTES != source.size:
        raise damaged(source, "bytes are missing, or too many, before its trailer")
    return trailer


def _manifest(source: Source, trailer: Trailer) -> dict[str, Any]:
    packed = source.read(trailer.offset, trailer.packed) if trailer.packed <= LARGEST_JSON else b""
    if hashlib.sha256(packed).digest() != trailer.sha256:
        raise damaged(source, "its manifest is not what was written")
    raw = _unpack(packed, LARGEST_JSON, exactly=False)
    data = _only_file(raw, MANIFEST, TAR_END) if raw else None
    if data is None:
        raise damaged(source, "its last member is no manifest")
    return _parsed(source, data)


def _parsed(source: Source, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged(source, "its header or its manifest is no JSON") from error
    if not isinstance(value, dict):
        raise damaged(source, "its header or its manifest is no JSON object")
    return value


def first_header(source: Source) -> Header | None:
    """None where the first member is not a header of ours."""
    reads = (source.read(0, length) for length in (FIRST_BYTES, LARGEST_HEADER))
    raws = (_unpack(read, LARGEST_HEADER, exactly=False, more_follows=True) for read in reads)
    raw = next(filter(None, raws), None)
    data = _only_file(raw, HEADER) if raw else None
    if data is None:
        return None
    try:
        return Header.of(_parsed(source, data), source.name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(source, f"its header is not one that this service writes ({error})") from error


def _unpack(packed: bytes, size: int, *, exactly: bool = True, more_follows: bool = False) -> bytes | None:
    """The content of one gzip member, of this size (or at most so large): never more than that takes memory."""
    unpacker = isal_zlib.decompressobj(31)
    try:
        raw = unpacker.decompress(packed, size + 1)
    except _IsalError:
        return None
    if not unpacker.eof or (unpacker.unused_data and not more_follows):
        return None
    return raw if len(raw) == size or (not exactly and len(raw) <= size) else None


def _only_file(raw: bytes, name: str, end: bytes = b"") -> bytes | None:
    """The content of the tar's file with which a member begins and ends; None where it is not exactly that."""
    block = tarfile.BLOCKSIZE
    size = _size_in(raw[:block], name)
    if size is None or raw[block + size :] != padding(size) + end:
        return None
    return raw[block : block + size]


def _size_in(block: bytes, name: str) -> int | None:
    """The size that a tar's header tells; None where it is not that of a file of this name."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.TarError, ValueError):
        return None
    return info.size if info.isreg() and info.name == name else None


def _frames(members: tuple[Member, ...], kind: str, trailer: Trailer) -> dict[int, tuple[int | None, int]]:
    """Raises ValueError unless the members stand one after the other, with names and sizes that backups have."""
    frames: dict[int, tuple[int | None, int]] = {}
    seen: set[str] = set()
    for name, run in groupby(members, key=lambda member: member.name):
        if name in seen or not _is_allowed(name, kind, is_first=not seen):
            raise ValueError(f"a member named {name!r} is not allowed there")
        seen.add(name)
        pieces = list(run)
        size = sum(piece.bytes for piece in pieces)
        frames |= {piece.offset: (None, 0) for piece in pieces}
        frames[pieces[-1].offset] = (None, len(padding(size)))
        frames[pieces[0].offset] = (size, frames[pieces[0].offset][1])
    end = 0
    for member in members:
        if member.offset != end or member.bytes > LARGEST_PIECE or member.packed > 2 * LARGEST_PIECE:
            raise ValueError(f"{member.name} at byte {member.offset}, with {member.bytes} bytes in {member.packed}")
        end = member.end
    if end != trailer.offset or not seen or (kind == SQLITE and DATABASE not in seen):
        raise ValueError(f"its members end at byte {end}")
    return frames


def _is_allowed(name: str, kind: str, *, is_first: bool) -> bool:
    if is_first:
        return name == HEADER
    return name == DATABASE if kind == SQLITE else COPY.fullmatch(name) is not None


def _by_folder(members: tuple[Member, ...]) -> dict[str, list[Member]]:
    folders: dict[str, list[tuple[int, Member]]] = {}
    for member in members:
        if match := COPY.fullmatch(member.name):
            folders.setdefault(match[1], []).append((int(match[2]), member))
    in_order = {folder: sorted(parts, key=lambda part: part[0]) for folder, parts in folders.items()}
    return {folder: [member for _, member in parts] for folder, parts in in_order.items()}


def _table(facts: dict[str, Any], by_folder: dict[str, list[Member]]) -> SavedTable:
    folder = facts["folder"]
    members = tuple(by_folder.pop(folder, ())) if folder is not None else ()
    rows, size = _number(facts["rows"]), _number(facts["bytes"])
    if folder is not None and (rows, size) != (sum(m.rows or 0 for m in members), sum(m.bytes for m in members)):
        raise ValueError(f"the members of {facts['name']} hold other rows than the table")
    schema = None if facts["schema"] is None else str(facts["schema"])
    columns, types, key = (tuple(map(str, facts[name])) for name in ("columns", "types", "key"))
    if len(columns) != len(types):
        raise ValueError(f"the table {facts['name']} has {len(columns)} columns and {len(types)} types")
    return SavedTable(schema, str(facts["name"]), columns, types, key, rows, size, members)


def _member(facts: dict[str, Any]) -> Member:
    offset, packed, size = (_number(facts[name]) for name in ("offset", "packed", "bytes"))
    rows = None if facts["rows"] is None else _number(facts["rows"])
    return Member(str(facts["name"]), offset, packed, str(facts["sha256"]), size, rows)


def _sequence(facts: dict[str, Any]) -> SavedSequence:
    last_value = facts["last_value"]
    if type(last_value) is not int or type(facts["is_called"]) is not bool:
        raise ValueError(f"the sequence {facts['name']} at {last_value!r}")
    return SavedSequence(str(facts["schema"]), str(facts["name"]), last_value, facts["is_called"])


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} where a number is needed")
    return value
