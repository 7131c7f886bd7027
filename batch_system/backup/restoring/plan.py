"""Plans a restore: which tables it fills, and every reason to refuse it. Nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.engine import URL

from batch_system.backup.file.format import WORDS
from batch_system.backup.file.reader import Backup, SavedTable
from batch_system.backup.file.selection import LEDGERS_MARK, is_ledgers
from batch_system.backup.postgresql.target import Target, TargetRelation
from batch_system.database.urls import safe_url
from batch_system.errors import BackupError

BACKUPS_TABLE = "batch_backups"
"""The ledger's table of backups. It describes files outside the database, so a restore does not
replace its rows.
"""
AT_ITS_REVISION = {
    "sqlite": "Restore it into a new file, by DATABASE_URL",
    "postgresql": "Make an empty database with the code that made the backup (`batch serve`), "
    "restore it into that",
}
"""Advice for a backup of another revision: restore it into a database of that revision, which is
upgraded afterwards.
"""
MOST_NAMED = 50
"""The most problems in a message, because a hostile file may have a million tables."""
KIND_NAMES = {
    "p": "a partitioned table",
    "f": "a foreign table",
    "m": "a materialized view",
    "v": "a view",
}


@dataclass(frozen=True)
class RestorePlan:
    """What a restore would do to a database, and the problems that prevent it.

    Attributes:
        backup: The path or URL of the backup.
        database: The URL of the database, without a password; on SQLite its path.
        taken_at: When the backup was taken (UTC).
        revision: The revision of the application's migrations in the backup.
        tables: The tables whose rows are restored.
        rows: How many rows each of these tables has now, by name; without tables whose rows this
            role can't see.
        problems: Why the restore is refused.
        notes: Sentences for the person who restores.
        is_new: The database has no table of the application yet.
        holds_ledger: The backup has tables of the ledger.
    """

    backup: str
    database: str
    taken_at: datetime
    revision: str | None
    tables: tuple[SavedTable, ...]
    rows: Mapping[str, int]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    is_new: bool = False
    holds_ledger: bool = False

    @property
    def name(self) -> str:
        """The name of the database itself, which a person types to confirm the restore."""
        return self.database.rpartition("/")[2]

    def refuse(self) -> None:
        """Raises BackupError if there are problems; its message lists up to MOST_NAMED of them."""
        if self.problems:
            more = len(self.problems) - MOST_NAMED
            raise BackupError(
                f"the backup {self.backup} can't be restored into {self.database}, and nothing was "
                "changed: "
                + "; ".join(
                    [*self.problems[:MOST_NAMED], *([f"and {more:,} more"] if more > 0 else [])]
                )
            )


def refuse_other_kind(backup: Backup, url: URL) -> None:
    """Raises BackupError if the backup was made of another kind of database than that of the
    URL.
    """
    kind = url.get_backend_name()
    if backup.header.kind != kind:
        raise BackupError(
            f"the backup {backup.source.name} is of {WORDS[backup.header.kind]}, but "
            f"{safe_url(url)} is {WORDS.get(kind, kind)}: a backup can only be restored into the "
            "kind of database that it was made from"
        )


def restored_tables(backup: Backup) -> tuple[SavedTable, ...]:
    """The tables whose rows are taken from the backup: all but version tables and the ledger's
    table of backups.
    """
    version_tables = backup.header.revisions
    ledgers = (
        {table.schema for table in backup.tables if is_ledgers(table.name)}
        if has_ledger(backup)
        else set()
    )
    return tuple(
        table
        for table in backup.tables
        if str(table) not in version_tables
        and not (table.schema in ledgers and table.name == BACKUPS_TABLE)
    )


def revision_problems(backup: Backup, present: Mapping[str, str]) -> list[str]:
    """The differences of migration revisions; `present`: those of the database, by the names of
    version tables.
    """
    problems, in_backup = [], backup.header.revisions
    for table in sorted({**in_backup, **present}):
        if _name(table) == LEDGERS_MARK and not has_ledger(backup):
            continue
        saved, now = in_backup.get(table), present.get(table)
        if saved != now:
            problems.append(
                f"the database is at another migration revision ({table}): the backup has "
                f"{saved or 'none'}, the database {now or 'none'}. "
                f"{AT_ITS_REVISION[backup.header.kind]}, and then start the present code, which "
                "upgrades it"
            )
    return problems


def has_ledger(backup: Backup) -> bool:
    """Whether the backup has tables of the ledger besides their version table."""
    marks = {table for table in backup.header.revisions if _name(table) == LEDGERS_MARK}
    schemas = {table.rpartition(".")[0] or None for table in marks}
    return any(
        table.schema in schemas and is_ledgers(table.name) and str(table) not in marks
        for table in backup.tables
    )


def _name(table: str) -> str:
    return table.rpartition(".")[2]


def for_postgresql(
    backup: Backup, url: URL, target: Target, present: Mapping[str, str], rows: Mapping[str, int]
) -> RestorePlan:
    """Plan a restore into a PostgreSQL database.

    `present`: the database's revisions, by the names of version tables. `rows`: how many rows its
    tables have, by name.
    """
    tables = restored_tables(backup)
    relations = {str(table): target.find(table.schema, table.name) for table in tables}
    existing = [relation for relation in relations.values() if relation is not None]
    if not existing and tables:
        problems = [
            "the database has none of the backup's tables: let the service make them (`batch "
            "serve`), then restore"
        ]
    else:
        problems = revision_problems(backup, present)
        problems += [
            line for table in tables for line in _table_problems(table, relations[str(table)])
        ]
        problems += _key_problems(target, existing) + _sequence_problems(backup, target)
    if target.has_large_objects:
        problems.append(
            "the database holds large objects, which backups can't contain: use pg_restore"
        )
    notes = _notes(backup, target, existing)
    header = backup.header
    return RestorePlan(
        backup.source.name,
        safe_url(url),
        header.taken_at,
        header.revision,
        tables,
        rows,
        tuple(problems),
        tuple(notes),
        is_new=is_new(target),
        holds_ledger=has_ledger(backup),
    )


def is_new(target: Target) -> bool:
    """Whether the application has no table in the database yet."""
    relations = target.relations.values()
    return not any(
        relation.kind in "rp" and not is_ledgers(relation.name) for relation in relations
    )


def _table_problems(table: SavedTable, relation: TargetRelation | None) -> list[str]:
    if relation is None:
        return [f"the table {table} is missing in the database"]
    if relation.kind != "r":
        return [f"{table} is {KIND_NAMES.get(relation.kind, 'no table')} in the database"]
    if not relation.is_owned:
        return [f"the table {table} belongs to {relation.owner}: only its owner can restore it"]
    return shape_problems(table, relation)


def shape_problems(table: SavedTable, relation: TargetRelation) -> list[str]:
    """Why rows with the columns of the saved table don't fit into the relation."""
    columns = {column.name: column for column in relation.columns}
    problems = column_problems(
        table, {c.name: c.type for c in relation.columns if not c.is_generated}
    )
    problems += [
        f"the column {name} of {table} is a generated column in the database"
        for name in table.columns
        if name in columns and columns[name].is_generated
    ]
    needed = [
        c.name
        for c in relation.columns
        if c.is_needed and not c.is_generated and c.name not in table.columns
    ]
    return problems + [missing_value_problem(name, table) for name in needed]


def column_problems(table: SavedTable, types: Mapping[str, str]) -> list[str]:
    """Which columns of the saved table the target lacks or has with another type; `types`: the
    target's, by column.
    """
    problems = []
    for name, saved in zip(table.columns, table.types, strict=True):
        if name not in types:
            problems.append(f"the column {name} of {table} is missing in the database")
        elif types[name] != saved:
            problems.append(
                f"the column {name} of {table} has the type {types[name]}, but {saved} in the "
                "backup"
            )
    return problems


def missing_value_problem(column: str, table: SavedTable) -> str:
    """The problem of a column that needs a value in each row, and that the backup does not have."""
    return (
        f"the column {column} of {table} is not in the backup, is not nullable and has no default"
    )


def _key_problems(target: Target, tables: Sequence[TargetRelation]) -> list[str]:
    holders = {key.holder: key.referred for key in target.keys_of(tables)}
    return [
        f"the table {target.relations[holder]}, whose foreign keys have to be created again, "
        f"belongs to {target.relations[holder].owner}"
        for holder in holders
        if not target.relations[holder].is_owned and target.relations[holder] not in tables
    ]


def _sequence_problems(backup: Backup, target: Target) -> list[str]:
    problems = []
    for sequence in backup.sequences:
        relation = target.find(sequence.schema, sequence.name)
        if relation is None or relation.kind != "S":
            if not is_ledgers(sequence.name):
                problems.append(f"the sequence {sequence} is missing in the database")
        elif not relation.is_owned:
            problems.append(
                f"the sequence {sequence} belongs to {relation.owner}: only its owner can restore "
                "it"
            )
    return problems


def _notes(backup: Backup, target: Target, restored: Sequence[TargetRelation]) -> list[str]:
    ids = target.with_parents(restored)
    notes = []
    for relation in target.relations.values():
        is_kept = (
            relation.kind == "r"
            and relation.id not in ids
            and str(relation) not in backup.header.revisions
        )
        refers = [
            str(target.relations[k.referred])
            for k in target.keys
            if k.holder == relation.id and k.referred in ids
        ]
        if is_kept and refers:
            notes.append(
                f"{relation} is not in the backup and stays as it is; it refers to "
                f"{', '.join(refers)}, so the restore fails if one of its rows would refer to a "
                "row that no longer exists"
            )
        elif is_kept and not is_ledgers(relation.name):
            notes.append(f"{relation} is not in the backup and stays as it is")
        elif relation.kind == "m":
            notes.append(f"{relation} is a materialized view: refresh it after the restore")
    return notes
