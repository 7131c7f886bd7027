"""The report of a restore: how many rows each table has before and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batch_system.backup.file.reader import SavedTable
from batch_system.errors import DamagedBackup


@dataclass(frozen=True)
class TableCounts:
    """How many rows a table has before and after a restore. `before` is None for a table that did
    not exist.
    """

    table: str
    before: int | None
    after: int


@dataclass(frozen=True)
class RestoreReport:
    """The result of a restore, or of its dry run.

    `backup`: the path or URL of the backup. `where`: the URL of the database, without a password.
    `seconds`: how long the restore took. `notes`: sentences for the person who restores.
    """

    backup: str
    where: str
    tables: tuple[TableCounts, ...]
    seconds: float
    dry_run: bool
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """The sum of the rows of all tables after the restore."""
        return sum(table.after for table in self.tables)


def checked_counts(
    source: str, tables: Sequence[SavedTable], before: Mapping[str, int], after: Mapping[str, int]
) -> tuple[TableCounts, ...]:
    """Return the counts of rows of `tables`, by their names in `before` and `after`.

    Raises DamagedBackup for the first table that has another number of rows than the manifest says.
    """
    for table in tables:
        rows = after.get(str(table))
        if rows != table.rows:
            raise DamagedBackup(
                f"{table} has {'no' if rows is None else rows} rows after the restore, but the "
                f"backup {source} counts {table.rows}, so nothing was changed. Look for rules or "
                "triggers on it, or use another backup"
            )
    return tuple(TableCounts(str(table), before.get(str(table)), table.rows) for table in tables)
