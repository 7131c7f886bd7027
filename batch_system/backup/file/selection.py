"""Selects the tables that a backup holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Self

from batch_system.database.our_tables import LEDGER_TABLES
from batch_system.errors import BackupError
from batch_system.escaping import echoed

LEDGERS_MARK = "batch_alembic_version"


@dataclass(frozen=True)
class Selection:
    """Patterns of BACKUP_INCLUDE and BACKUP_EXCLUDE (`schema.table` or `table`, with * and ?), and
    BACKUP_LEDGER.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ledger: bool = False

    @classmethod
    def of(cls, include: str, exclude: str, ledger: bool) -> Self:
        return cls(_patterns(include), _patterns(exclude), ledger)

    def holds(self, names: Iterable[str]) -> bool:
        """Whether a backup holds a table with these names.

        `names`: its own name with and without the schema, and those of the tables that it is a
        partition of.
        """
        names = tuple(names)
        return (not self.include or _matches(self.include, names)) and not _matches(
            self.exclude, names
        )

    def refuse_idle_patterns(self, tables: Iterable[Iterable[str]]) -> None:
        """Raises BackupError if a pattern matches none of the tables: it is probably misspelt."""
        names = {name for table in tables for name in table}
        for setting, patterns in (
            ("BACKUP_INCLUDE", self.include),
            ("BACKUP_EXCLUDE", self.exclude),
        ):
            for pattern in patterns:
                if not _matches((pattern,), names):
                    raise BackupError(
                        f"{setting} has {echoed(pattern)}, which matches no table: look at its "
                        "spelling"
                    )


def is_ledgers(name: str) -> bool:
    """Whether this is the name of a table of the ledger, if its schema holds a ledger."""
    return name in LEDGER_TABLES


def _patterns(text: str) -> tuple[str, ...]:
    return tuple(filter(None, re.split(r"[,\s]+", text)))


def _matches(patterns: Iterable[str], names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def quoted(*names: str) -> str:
    """The quoted name for SQL on both databases: that of a column, of a table, or of a table with
    its schema.
    """
    return ".".join('"' + name.replace('"', '""') + '"' for name in names)
