"""What differs between two states of a database: values that say nothing about where they were found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from service.backup.comparing.tally import Counts
from service.escaping import brief


@dataclass(frozen=True, slots=True)
class Table:
    """A table as one side has it. `key`: the columns of its primary key."""

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
    """One of the two states: a backup, or the database as it is now. `left_out`: tables about which it says nothing."""

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
    """A table as both sides have it; None where one does not."""

    before: Table | None
    after: Table | None

    @property
    def name(self) -> str:
        """For people: the schema `public` goes without saying."""
        table = self.before or self.after
        if table is None:
            return ""
        return table.name if table.schema == "public" else table.path

    @property
    def shared(self) -> tuple[str, ...]:
        """The columns that both have, in the order of the side before."""
        after = self._of_after()
        return tuple(name for name in self._of_before() if name in after)

    @property
    def key(self) -> tuple[str, ...]:
        """Empty when there is none, not the same one, or a generated column is in it: then rows can't be told apart."""
        if self.before is None or self.after is None or self.before.key != self.after.key:
            return ()
        return self.before.key if set(self.before.key) <= set(self.shared) else ()

    @property
    def changes(self) -> list[str]:
        """What is different about the table itself, a sentence each."""
        if self.before is None or self.after is None:
            return [f"table {brief(self.name)} {'added' if self.before is None else 'removed'}"]
        was, now = self._of_before(), self._of_after()
        said = [f"column {brief(name)} added, {brief(now[name])}" for name in now if name not in was]
        said += [f"column {brief(name)} removed" for name in was if name not in now]
        said += [
            f"column {brief(name)} was {brief(was[name])}, is {brief(now[name])}"
            for name in self.shared
            if was[name] != now[name]
        ]
        if self.before.key != self.after.key:
            old, new = (brief(", ".join(key)) or "none" for key in (self.before.key, self.after.key))
            said.append(f"primary key was {old}, is {new}")
        return [f"{brief(self.name)}: {sentence}" for sentence in said]

    def _of_before(self) -> dict[str, str]:
        return self.before.type_of if self.before else {}

    def _of_after(self) -> dict[str, str]:
        return self.after.type_of if self.after else {}


@dataclass(frozen=True, slots=True)
class TableDifference:
    """`added`, `removed`, `changed`: rows, where the primary key tells them apart; else None.

    Values are compared in the columns that both sides have; `same` says that no row differs there.
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
    """`tables`: the largest first. `left_out`: those that one side has, and the other one leaves out."""

    before: Side
    after: Side
    tables: tuple[TableDifference, ...]
    left_out: tuple[str, ...]

    @classmethod
    def of(cls, before: Side, after: Side, counted: Iterable[tuple[Pair, Counts]]) -> Self:
        tables = [TableDifference.of(pair, counts) for pair, counts in counted]
        tables.sort(key=lambda table: (-max(table.rows_before or 0, table.rows_after or 0), table.table))
        left_out = {table.path for one, other in ((before, after), (after, before)) for table in _unknown(one, other)}
        return cls(before, after, tuple(tables), tuple(sorted(left_out)))

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
        return [sentence for table in self.tables for sentence in table.schema]


def pairs(before: Side, after: Side) -> list[Pair]:
    """Every table of either side, by name, but those that the other one leaves out."""
    old, new = ({table.path: table for table in side.tables} for side in (before, after))
    unknown = {table.path for one, other in ((before, after), (after, before)) for table in _unknown(one, other)}
    return [Pair(old.get(path), new.get(path)) for path in sorted((old.keys() | new.keys()) - unknown)]


def _unknown(one: Side, other: Side) -> Iterable[Table]:
    there = {table.path for table in other.tables}
    return (table for table in one.tables if table.path in other.left_out and table.path not in there)
