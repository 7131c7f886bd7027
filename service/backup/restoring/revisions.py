"""Compares the migration revisions of a backup and of a database, by their version tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from service.backup.file.reader import Backup
from service.database.histories import DATA_HISTORY, data_revision
from service.database.migrate import ALEMBIC_VERSION

SAME_TABLES = {"ledger_0010": "ledger_0009", "ledger_0023": "ledger_0022"}
"""Revisions that changed no table but for its indexes, each with its predecessor: rows of either fit into tables of the
other."""


def of_backup(backup: Backup) -> dict[str, str]:
    """The revisions of a backup by the names of its version tables, with those that backups of older code lack."""
    return with_data(backup.header.revisions, [*map(str, backup.tables), *backup.left_out])


def with_data(revisions: Mapping[str, str], tables: Iterable[str]) -> dict[str, str]:
    """Add the revision of the service's tables in the application database if older code gave them no version table.

    `tables`: the names of all tables; on PostgreSQL with their schemas, as in `revisions`.
    """
    by_schema: dict[str, list[str]] = {}
    for table in tables:
        schema, dot, name = table.rpartition(".")
        by_schema.setdefault(schema + dot, []).append(name)
    completed = dict(revisions)
    for schema, names in by_schema.items():
        if (revision := data_revision(names, revisions.get(schema + ALEMBIC_VERSION))) is not None:
            completed.setdefault(schema + DATA_HISTORY.version_table, revision)
    return completed


def differ(saved: str | None, present: str | None) -> bool:
    """Whether tables of these two revisions may be different."""
    return _tables_of(saved) != _tables_of(present)


def _tables_of(revision: str | None) -> str | None:
    return None if revision is None else SAME_TABLES.get(revision, revision)
