"""Reads a backup's header and manifest, and checks the type and the bounds of each field.

A file from elsewhere may hold any manifest with checksums that match, so nothing in it is trusted.
An error names the field that is wrong. Unknown fields are ignored, because a later version may
write more of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, FailFast, Field, TypeAdapter, ValidationError

from batch_system.backup.file.format import (
    FOLDER,
    LARGEST_NUMBER,
    SQLITE,
    Header,
    Member,
    Number,
    Text,
)
from batch_system.backup.file.json_reader import JsonReader

T = TypeVar("T")

LARGEST_CONTENTS = 104 * 1024 * 1024
"""Bytes of memory that the objects of a manifest may take. A manifest of 64 MiB that this service
writes takes less.
"""
TABLE_BYTES, MEMBER_BYTES, NAME_BYTES, SLOT_BYTES = 700, 320, 100, 8
"""Approximate bytes of memory for a table or sequence, a member, one more name, and an element of a
tuple.
"""

MOST_COLUMNS = 32_767
"""The most columns that a table can have in SQLite. PostgreSQL allows 1,600."""

Texts = Annotated[tuple[Text, ...], Field(max_length=MOST_COLUMNS), FailFast()]


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("it has a name twice")
    return names


@dataclass(frozen=True, slots=True)
class SavedTable:
    """A table in a backup. `columns` has its columns without the generated ones, and `key` those of
    the primary key.
    """

    schema: str | None
    name: str
    columns: tuple[str, ...]
    types: tuple[str, ...]
    key: tuple[str, ...]
    rows: int
    bytes: int

    def __str__(self) -> str:
        return self.name if self.schema is None else f"{self.schema}.{self.name}"


@dataclass(frozen=True, slots=True)
class SavedSequence:
    schema: Text
    name: Text
    last_value: Annotated[int, Field(strict=True, ge=-LARGEST_NUMBER - 1, le=LARGEST_NUMBER)]
    is_called: Annotated[bool, Field(strict=True)]

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


@dataclass(frozen=True, slots=True)
class _Table:
    """A table as the manifest describes it. `folder`: the folder of its rows in the archive
    (PostgreSQL only).
    """

    schema: Text | None
    name: Text
    folder: Annotated[str, Field(strict=True, pattern=f"^{FOLDER}$")] | None
    columns: Annotated[Texts, AfterValidator(_distinct)]
    types: Texts
    key: Annotated[Texts, AfterValidator(_distinct)]
    rows: Number
    bytes: Number


_TABLE, _MEMBER, _SEQUENCE, _NAME = (
    TypeAdapter[Any](kind) for kind in (_Table, Member, SavedSequence, Text)
)
_HEADER = TypeAdapter(Header)


@dataclass(frozen=True)
class Manifest:
    """What a backup holds. `tables`: each table with its folder in the archive (None on SQLite)."""

    header: Header
    tables: tuple[tuple[SavedTable, str | None], ...]
    sequences: tuple[SavedSequence, ...]
    left_out: tuple[str, ...]
    members: tuple[Member, ...]

    @classmethod
    def read(cls, pieces: Iterator[str], source: str) -> Manifest:
        """Read the JSON's text. Raises ValueError, which names the field, and BackupError for a
        newer format.
        """
        memory, fields = _Memory(), dict[str, Any]()
        json = JsonReader(pieces)
        for key in json.fields():
            if key in fields:
                raise ValueError(f"it has {key} twice")
            if key in _LISTS and not json.is_array():
                raise ValueError(f"{key} is not a list")
            if key == "header":
                fields[key] = header_of(json.value(), source)
            elif key in _LISTS:
                fields[key] = tuple(_LISTS[key](json.items(), memory))
            else:
                for _ in json.items() if json.is_array() else (json.value(),):
                    memory.take(NAME_BYTES)
        if missing := [name for name in ("header", *_LISTS) if name not in fields]:
            raise ValueError(f"{missing[0]} is missing")
        manifest = cls(**fields)
        manifest._check()
        return manifest

    def _check(self) -> None:
        """Check the conditions that concern more than one field."""
        is_sqlite = self.header.kind == SQLITE
        for number, (table, folder) in enumerate(self.tables):
            if (table.schema is None, folder is None) != (is_sqlite, is_sqlite):
                raise ValueError(
                    f"tables[{number}] has a schema and a folder that no backup of "
                    f"{self.header.kind} has"
                )
            _refuse_impossible(f"tables[{number}]", table)
        if is_sqlite and self.sequences:
            raise ValueError("it has sequences, which a backup of SQLite never has")
        _refuse_doubled("tables", [(table.schema, table.name) for table, _ in self.tables])
        _refuse_doubled("tables", [folder for _, folder in self.tables if folder is not None])
        _refuse_doubled(
            "sequences", [(sequence.schema, sequence.name) for sequence in self.sequences]
        )
        rows = sum(table.rows for table, _ in self.tables)
        if rows > LARGEST_NUMBER or self.header.rows not in (None, rows):
            raise ValueError("header.rows is not the sum of the tables' rows")


class _Memory:
    """Counts the memory that a manifest's objects take, and stores equal names once."""

    def __init__(self) -> None:
        self._left = LARGEST_CONTENTS
        self._names: dict[str, str] = {}

    def take(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise ValueError(
                "it describes more tables, columns and members than a backup of this service can "
                "have"
            )

    def intern(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(map(self._intern, names))

    def _intern(self, name: str) -> str:
        known = self._names.setdefault(name, name)
        self.take(
            SLOT_BYTES if known is not name else SLOT_BYTES + NAME_BYTES + sys.getsizeof(name)
        )
        return known


def header_of(facts: Any, source: str) -> Header:
    """The header in parsed JSON. Raises ValueError, which names the field, and BackupError for a
    newer format.
    """
    Header.refuse_newer(facts, source)
    return _validated(_HEADER, facts, "header")


def _tables(items: Iterable[Any], memory: _Memory) -> Iterator[tuple[SavedTable, str | None]]:
    for number, facts in enumerate(items):
        table = _validated(_TABLE, facts, f"tables[{number}]")
        if len(table.columns) != len(table.types):
            raise ValueError(
                f"tables[{number}] has {len(table.columns)} columns and {len(table.types)} types"
            )
        memory.take(TABLE_BYTES)
        schema = None if table.schema is None else memory.intern([table.schema])[0]
        (name,), columns, types, key = map(
            memory.intern, ([table.name], table.columns, table.types, table.key)
        )
        yield SavedTable(schema, name, columns, types, key, table.rows, table.bytes), table.folder


def _sequences(items: Iterable[Any], memory: _Memory) -> Iterator[SavedSequence]:
    for number, facts in enumerate(items):
        sequence = _validated(_SEQUENCE, facts, f"sequences[{number}]")
        memory.take(TABLE_BYTES)
        schema, name = memory.intern([sequence.schema, sequence.name])
        yield replace(sequence, schema=schema, name=name)


def _left_out(items: Iterable[Any], memory: _Memory) -> Iterator[str]:
    for number, name in enumerate(items):
        memory.take(NAME_BYTES)
        yield from memory.intern([_validated(_NAME, name, f"left_out[{number}]")])


def _members(items: Iterable[Any], memory: _Memory) -> Iterator[Member]:
    """The gzip members. Those of one file follow one another, and share one string object as their
    name.
    """
    name = ""
    for number, facts in enumerate(items):
        member = _validated(_MEMBER, facts, f"members[{number}]")
        memory.take(MEMBER_BYTES)
        yield replace(member, name=name) if member.name == name else member
        name = member.name


_LISTS = {"tables": _tables, "sequences": _sequences, "left_out": _left_out, "members": _members}


def _validated(adapter: TypeAdapter[T], facts: Any, where: str) -> T:
    try:
        return adapter.validate_python(facts)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = "".join(
            f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]
        )
        is_object = first["type"] != "dataclass_type"
        cause = (
            first["msg"].removeprefix("Value error, ") if is_object else "Input should be an object"
        )
        raise ValueError(f"{where}{place}: {cause}") from None


def _refuse_impossible(where: str, table: SavedTable) -> None:
    if table.schema is None and table.bytes:
        raise ValueError(f"{where}.bytes must be 0 for a table of SQLite")
    if table.schema is not None and "" in (table.schema, table.name, *table.columns, *table.key):
        raise ValueError(f"{where} has an empty name, which PostgreSQL does not allow")


def _refuse_doubled(where: str, names: list[Any]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: it has a name twice")
