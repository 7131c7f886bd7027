"""The differences between two states of a database, as plain values, whatever kind of database it
is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from batch_system.backup.comparing.tally import Counts
from batch_system.escaping import brief


@dataclass(frozen=True, slots=True)
class Table:
    """A table as one side has it. `types`: of its columns, in their order. `key`: the columns of
    its primary key.
    """

    schema: str | None
    name: str
    columns: tuple[str, ...]
    types: tuple[str, ...]
    key: tuple[str, ...]

    @property
    def path(self) -> str:
        return self.name if self.schema is None else f"{self.schema}.{self.name}"

    @property
    def type_of(self) -> dict[str, str]:
        return dict(zip(self.columns, self.types, strict=True))


@dataclass(frozen=True)
class Side:
    """One of the two states: a backup, or the current database.

    `taken_at`: the instant of the state (UTC). `left_out`: paths of the tables that the state
    leaves out.
    """

    name: str
    taken_at: datetime
    kind: str
    database: str
    revision: str | None
    revisions: Mapping[str, str]
    tables: tuple[Table, ...]
    left_out: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Pair:
    """A table on both sides; None for a side that does not have it."""

    before: Table | None
    after: Table | None

    @property
    def name(self) -> str:
        """The name for messages, without the schema `public`."""
        table = self.before or self.after
        if table is None:
            return ""
        return table.name if table.schema == "public" else table.path

    @property
    def shared(self) -> tuple[str, ...]:
        """The columns that both sides have, in the order of the side before."""
        after = self._of_after()
        return tuple(name for name in self._of_before() if name in after)

    @property
    def key(self) -> tuple[str, ...]:
        """The columns of the primary key if it is the same on both sides and has no generated
        column; else empty.
        """
        if self.before is None or self.after is None or self.before.key != self.after.key:
            return ()
        return self.before.key if set(self.before.key) <= set(self.shared) else ()

    @property
    def changes(self) -> list[str]:
        """The differences in the definition of the table, one text each."""
        if self.before is None or self.after is None:
            return [f"table {brief(self.name)} {'added' if self.before is None else 'removed'}"]
        old, new = self._of_before(), self._of_after()
        changes = [
            f"column {brief(name)} added, {brief(new[name])}" for name in new if name not in old
        ]
        changes += [f"column {brief(name)} removed" for name in old if name not in new]
        changes += [
            f"column {brief(name)} was {brief(old[name])}, is {brief(new[name])}"
            for name in self.shared
            if old[name] != new[name]
        ]
        if self.before.key != self.after.key:
            old_key, new_key = (
                brief(", ".join(key)) or "none" for key in (self.before.key, self.after.key)
            )
            changes.append(f"primary key was {old_key}, is {new_key}")
        return [f"{brief(self.name)}: {change}" for change in changes]

    def _of_before(self) -> dict[str, str]:
        return self.before.type_of if self.before else {}

    def _of_after(self) -> dict[str, str]:
        return self.after.type_of if self.after else {}


@dataclass(frozen=True, slots=True)
class TableDifference:
    """The differences of a table. `rows_before`, `rows_after`: numbers of rows; None if that side
    has no such table.

    `added`, `removed`, `changed`: numbers of rows; None if no common primary key identifies rows.
    Rows are compared in the columns that both sides have, and `same` says whether all rows are
    equal there. `key`: the columns of the common primary key. `schema`: the differences in the
    definition of the table, one text each.
    """

    table: str
    rows_before: int | None
    rows_after: int | None
    added: int | None
    removed: int | None
    changed: int | None
    same: bool
    key: tuple[str, ...]
    schema: tuple[str, ...]

    @classmethod
    def of(cls, pair: Pair, counts: Counts) -> Self:
        return cls(
            table=pair.name,
            rows_before=counts.before if pair.before else None,
            rows_after=counts.after if pair.after else None,
            added=counts.added,
            removed=counts.removed,
            changed=counts.changed,
            same=counts.same,
            key=pair.key,
            schema=tuple(pair.changes),
        )


@dataclass(frozen=True)
class Difference:
    """All differences. `tables`: the largest first. `left_out`: tables of one side that the other
    side leaves out.
    """

    before: Side
    after: Side
    tables: tuple[TableDifference, ...]
    left_out: tuple[str, ...]

    @classmethod
    def of(cls, before: Side, after: Side, counted: Iterable[tuple[Pair, Counts]]) -> Self:
        tables = [TableDifference.of(pair, counts) for pair, counts in counted]
        tables.sort(
            key=lambda table: (-max(table.rows_before or 0, table.rows_after or 0), table.table)
        )
        return cls(before, after, tuple(tables), tuple(sorted(_left_out(before, after))))

    @property
    def added(self) -> int:
        return sum(table.added or 0 for table in self.tables)

    @property
    def removed(self) -> int:
        return sum(table.removed or 0 for table in self.tables)

    @property
    def changed(self) -> int:
        return sum(table.changed or 0 for table in self.tables)

    @property
    def schema(self) -> list[str]:
        return [change for table in self.tables for change in table.schema]


def pairs(before: Side, after: Side) -> list[Pair]:
    """Every table of either side, by name, without those that the other side leaves out."""
    old, new = ({table.path: table for table in side.tables} for side in (before, after))
    return [
        Pair(old.get(path), new.get(path))
        for path in sorted((old.keys() | new.keys()) - _left_out(before, after))
    ]


def _left_out(before: Side, after: Side) -> set[str]:
    """The paths of the tables that one side has, and the other side leaves out."""
    old, new = ({table.path for table in side.tables} for side in (before, after))
    return ((old & after.left_out) - new) | ((new & before.left_out) - old)
