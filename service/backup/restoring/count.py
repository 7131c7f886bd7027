"""How many rows each table has, before and after, and whether they are those that the manifest counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.backup.file.reader import SavedTable
from service.errors import DamagedBackup


@dataclass(frozen=True)
class Counted:
    """A table's rows before and after. `before` is None where it was not there."""

    table: str
    before: int | None
    after: int


@dataclass(frozen=True)
class Report:
    """What a restore has done, or would have done (`dry_run`). `where`: the database, without a password."""

    backup: str
    where: str
    tables: tuple[Counted, ...]
    seconds: float
    dry_run: bool
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return sum(table.after for table in self.tables)


def compared(
    source: str, tables: Sequence[SavedTable], before: Mapping[str, int], after: Mapping[str, int]
) -> tuple[Counted, ...]:
    """Raises DamagedBackup for the first table that has not the rows that were saved."""
    for table in tables:
        if (found := after.get(str(table))) != table.rows:
            raise DamagedBackup(
                f"{table} has {found if found is not None else 'no'} rows after the restore, but the backup {source} "
                f"counts {table.rows}: nothing was changed. Look for rules or triggers on it, or use another backup"
            )
    return tuple(Counted(str(table), before.get(str(table)), table.rows) for table in tables)
