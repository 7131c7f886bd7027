"""What a restore would do, and every reason to refuse it, before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.engine import URL

from service.backup.file.format import WORDS
from service.backup.file.reader import Backup, SavedTable
from service.backup.file.selection import LEDGERS_MARK, is_ledgers
from service.backup.postgresql.target import Relation, Target
from service.backup.restoring import revisions
from service.database.urls import safe_url
from service.errors import BackupError

ABOUT_FILES = "batch_backups"
"""It tells of files outside of the database, which no restore brings back."""
ONTO_ITS_OWN = {
    "sqlite": "Restore it into a new file, by DATABASE_URL",
    "postgresql": "Let the code of that time make an empty database (`batch serve`), restore it into that",
}
"""There is no way down to an older revision, so the way leads up from there."""
MOST_NAMED = 50
"""So many problems are told: a hostile file may have a million tables."""
KIND_NAMES = {"p": "a partitioned table", "f": "a foreign table", "m": "a materialized view", "v": "a view"}


@dataclass(frozen=True)
class Plan:
    """`rows`: how many each of the tables has now, by its name, where this role may see them.

    `is_new`: nothing is there yet. `holds_ledger`: the ledger's are among them.
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
        """The database's own name: what a person types who means it."""
        return self.database.rpartition("/")[2]

    def refuse(self) -> None:
        """Raises BackupError with what is in the way: all of it, unless that is very much."""
        if self.problems:
            more = len(self.problems) - MOST_NAMED
            raise BackupError(
                f"the backup {self.backup} can't be restored into {self.database}, and nothing was changed: "
                + "; ".join([*self.problems[:MOST_NAMED], *([f"and {more:,} more"] if more > 0 else [])])
            )


def refuse_other_kind(backup: Backup, url: URL) -> None:
    kind = url.get_backend_name()
    if backup.header.kind != kind:
        raise BackupError(
            f"the backup {backup.source.name} is one of {WORDS[backup.header.kind]}, and {safe_url(url)} is "
            f"{WORDS.get(kind, kind)}: a backup can only be restored into the kind of database that it was made of"
        )


def restored(backup: Backup) -> tuple[SavedTable, ...]:
    """The tables whose rows come from the backup: never those that say at which migration the schema is."""
    known = backup.header.revisions
    ledgers = {table.schema for table in backup.tables if is_ledgers(table.name)} if has_ledger(backup) else set()
    return tuple(
        table
        for table in backup.tables
        if str(table) not in known and not (table.schema in ledgers and table.name == ABOUT_FILES)
    )


def other_revisions(backup: Backup, present: Mapping[str, str]) -> list[str]:
    """`present`: what the target's tables of alembic say, by their names."""
    found, in_backup = [], revisions.of_backup(backup)
    for table in sorted({**in_backup, **present}):
        if _name(table) == LEDGERS_MARK and not has_ledger(backup):
            continue
        saved, now = in_backup.get(table), present.get(table)
        if revisions.differ(saved, now):
            found.append(
                f"it is at another migration revision ({table}): the backup has {saved or 'none'}, the database "
                f"{now or 'none'}. {ONTO_ITS_OWN[backup.header.kind]}, and start the present code, which upgrades it"
            )
    return found


def has_ledger(backup: Backup) -> bool:
    """Whether the ledger's own tables are in it."""
    marks = {table for table in backup.header.revisions if _name(table) == LEDGERS_MARK}
    schemas = {table.rpartition(".")[0] or None for table in marks}
    return any(
        table.schema in schemas and is_ledgers(table.name) and str(table) not in marks for table in backup.tables
    )


def _name(table: str) -> str:
    return table.rpartition(".")[2]


def for_postgresql(
    backup: Backup, url: URL, target: Target, present: Mapping[str, str], rows: Mapping[str, int]
) -> Plan:
    tables = restored(backup)
    found = {str(table): target.find(table.schema, table.name) for table in tables}
    there = [relation for relation in found.values() if relation is not None]
    if not there and tables:
        problems = ["the database has none of its tables: let the service make them (`batch serve`), then restore"]
    else:
        problems = other_revisions(backup, present)
        problems += [line for table in tables for line in _table_problems(table, found[str(table)])]
        problems += _key_problems(target, there) + _sequence_problems(backup, target)
    if target.has_large_objects:
        problems.append("the database holds large objects, which backups can't contain: use pg_restore")
    notes = _notes(backup, target, there)
    header = backup.header
    return Plan(
        *(backup.source.name, safe_url(url), header.taken_at, header.revision, tables, rows),
        tuple(problems),
        tuple(notes),
        is_new=is_new(target),
        holds_ledger=has_ledger(backup),
    )


def is_new(target: Target) -> bool:
    """Whether the application has no table there yet."""
    return not any(one.kind in "rp" and not is_ledgers(one.name) for one in target.relations.values())


def _table_problems(table: SavedTable, relation: Relation | None) -> list[str]:
    if relation is None:
        return [f"the table {table} is missing in the database"]
    if relation.kind != "r":
        return [f"{table} is {KIND_NAMES.get(relation.kind, 'no table')} in the database"]
    if not relation.is_owned:
        return [f"the table {table} belongs to {relation.owner}: only its owner can restore it"]
    return shape_problems(table, relation)


def shape_problems(table: SavedTable, relation: Relation) -> list[str]:
    """Why rows with the table's columns don't fit into the relation's."""
    columns = {column.name: column for column in relation.columns}
    found = column_problems(table, {c.name: c.type for c in relation.columns if not c.is_generated})
    found += [
        f"the column {name} of {table} is a generated one in the database"
        for name in table.columns
        if name in columns and columns[name].is_generated
    ]
    needed = [c.name for c in relation.columns if c.is_needed and not c.is_generated and c.name not in table.columns]
    return found + [needed_problem(name, table) for name in needed]


def column_problems(table: SavedTable, types: Mapping[str, str]) -> list[str]:
    """`types`: of the columns that the table has in the target."""
    found = []
    for name, saved in zip(table.columns, table.types, strict=True):
        if name not in types:
            found.append(f"the column {name} of {table} is missing in the database")
        elif types[name] != saved:
            found.append(f"the column {name} of {table} has the type {types[name]}, but {saved} in the backup")
    return found


def needed_problem(column: str, table: SavedTable) -> str:
    return f"the column {column} of {table} is not in the backup, and may neither be null nor has a default"


def _key_problems(target: Target, there: Sequence[Relation]) -> list[str]:
    holders = {key.holder: key.referred for key in target.keys_of(there)}
    return [
        f"the table {target.relations[holder]}, whose foreign keys have to be made anew, belongs to "
        f"{target.relations[holder].owner}"
        for holder in holders
        if not target.relations[holder].is_owned and target.relations[holder] not in there
    ]


def _sequence_problems(backup: Backup, target: Target) -> list[str]:
    found = []
    for sequence in backup.sequences:
        relation = target.find(sequence.schema, sequence.name)
        if relation is None or relation.kind != "S":
            if not is_ledgers(sequence.name):
                found.append(f"the sequence {sequence} is missing in the database")
        elif not relation.is_owned:
            found.append(f"the sequence {sequence} belongs to {relation.owner}: only its owner can restore it")
    return found


def _notes(backup: Backup, target: Target, there: Sequence[Relation]) -> list[str]:
    ids = target.with_parents(there)
    notes = []
    for relation in target.relations.values():
        is_kept = relation.kind == "r" and relation.id not in ids and str(relation) not in backup.header.revisions
        refers = [
            str(target.relations[k.referred]) for k in target.keys if k.holder == relation.id and k.referred in ids
        ]
        if is_kept and refers:
            notes.append(
                f"{relation} is not in the backup and stays as it is; it refers to {', '.join(refers)}, so the restore "
                "fails where a row of it would lose what it refers to"
            )
        elif is_kept and not is_ledgers(relation.name):
            notes.append(f"{relation} is not in the backup and stays as it is")
        elif relation.kind == "m":
            notes.append(f"{relation} is a materialized view: refresh it after the restore")
    return notes
