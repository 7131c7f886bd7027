"""At which migrations a backup is and a database, compared by their version tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from service.backup.file.reader import Backup
from service.database.histories import DATA_HISTORY, data_revision
from service.database.migrate import ALEMBIC_VERSION

SAME_TABLES = {"ledger_0010": "ledger_0009"}
"""Revisions that changed no table, each with the one before it: rows of the one fit into tables of the other."""


def of_backup(backup: Backup) -> dict[str, str]:
    """What its version tables say, by their names. Of a backup that older code made, as the present code has them."""
    return with_data(backup.header.revisions, [*map(str, backup.tables), *backup.left_out])


def with_data(revisions: Mapping[str, str], tables: Iterable[str]) -> dict[str, str]:
    """`revisions`, and that of our tables beside the authors' data, where older code gave them no version table.

    `tables`: the names of all tables; on PostgreSQL with their schemas, as in `revisions`.
    """
    by_schema: dict[str, list[str]] = {}
    for table in tables:
        schema, dot, name = table.rpartition(".")
        by_schema.setdefault(schema + dot, []).append(name)
    found = dict(revisions)
    for schema, names in by_schema.items():
        if (revision := data_revision(names, revisions.get(schema + ALEMBIC_VERSION))) is not None:
            found.setdefault(schema + DATA_HISTORY.version_table, revision)
    return found


def differ(saved: str | None, present: str | None) -> bool:
    """Whether tables of these two revisions may be different."""
    return _tables_of(saved) != _tables_of(present)


def _tables_of(revision: str | None) -> str | None:
    return None if revision is None else SAME_TABLES.get(revision, revision)
