"""Plans a restore into an SQLite database: which tables it makes, and every reason to refuse it.

A table is made as it is in the live file, or as the service's migrations make it at the backup's
revision. The schema in the backup is never used, because anybody may have written the file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from batch_system.backup.file.reader import Backup, SavedTable
from batch_system.backup.file.selection import LEDGERS_MARK, is_ledgers
from batch_system.backup.restoring import plan as plans
from batch_system.backup.restoring.plan import RestorePlan
from batch_system.backup.sqlite import tables as sqlite_tables
from batch_system.backup.sqlite.new_file import LIVE, file_settings
from batch_system.backup.sqlite.plain_file import BY_HAND, opened
from batch_system.backup.sqlite.structure import Structure
from batch_system.database.engine import Database
from batch_system.database.migrate import History, migrate
from batch_system.escaping import brief

MIGRATED_FILE = "made.sqlite3"
A_TEMPORARY_FILE = "a temporary file"
MOST_NAMED = 5


@dataclass(frozen=True)
class LiveFile:
    """The contents of the live database file; empty if there is no file or no table in it.

    `rows`: how many rows each table has, by its name. `revisions`: by the names of version tables.
    `settings`: of the file, by the names of pragmas.
    """

    structure: Structure = field(default_factory=Structure)
    rows: dict[str, int] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, int | str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> LiveFile:
        """Read the file. Raises sqlite3.Error."""
        if not path.is_file():
            return cls()
        with closing(opened(path, "mode=rw")) as connection:
            rows = {
                str(table["name"]): int(table["rows"])
                for table in sqlite_tables.described(connection)
            }
            structure = Structure.of(connection)
            revisions = sqlite_tables.revisions(connection)
            return (
                cls(structure, rows, revisions, file_settings(connection))
                if structure.tables
                else cls()
            )


@dataclass(frozen=True)
class MigratedFile:
    """A file with the tables of the service's migrations, and their revisions by the names of
    version tables.
    """

    path: Path | None = None
    revisions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SqliteRestore:
    """A planned restore. `structure`: of the tables, indexes, views and triggers of the new file.

    `migrated`: the path of a file with tables of the service's migrations; None if the live file
    lacks none of them.
    """

    plan: RestorePlan
    structure: Structure
    live: LiveFile
    migrated: Path | None

    def kept(self, schema: str) -> list[str]:
        """The tables that are not restored: of the live file if `schema` is LIVE, or else those of
        the migrations.
        """
        restored = {table.name for table in self.plan.tables}
        live = {table.name for table in self.live.structure.tables}
        return [
            table.name
            for table in self.structure.with_rows()
            if table.name not in restored and (table.name in live) == (schema == LIVE)
        ]


def for_live(
    backup: Backup, path: Path, histories: Sequence[History], folder: Path
) -> SqliteRestore:
    """Plan a restore into the live file. `folder`: an empty folder for the file that the migrations
    make.
    """
    live, tables = LiveFile.of(path), plans.restored_tables(backup)
    structure, migrated = _structure(backup, live, histories, folder)
    if live.structure.tables:
        problems = plans.revision_problems(backup, {**migrated.revisions, **live.revisions})
        problems += _missing(backup, [t.name for t in tables if structure.table(t.name) is None])
    else:
        needed = [*(table.name for table in backup.tables), *_left_out(backup)]
        problems = _missing(backup, [name for name in needed if structure.table(name) is None])
    return _planned(backup, str(path.absolute()), live, structure, migrated, tables, problems)


def for_drill(
    backup: Backup, path: Path | None, histories: Sequence[History], folder: Path
) -> SqliteRestore:
    """Plan a restore into an empty file. Tables are made as in the live file `path` if that is at
    the same revision.
    """
    live = LiveFile.of(path) if path else LiveFile()
    if plans.revision_problems(backup, live.revisions):
        live = LiveFile()
    structure, migrated = _structure(backup, live, histories, folder)
    problems = _missing(backup, [t.name for t in backup.tables if structure.table(t.name) is None])
    restore = _planned(backup, A_TEMPORARY_FILE, live, structure, migrated, backup.tables, problems)
    return replace(restore, plan=replace(restore.plan, rows={}, notes=()))


def for_copy(
    backup: Backup, path: Path, example: Path, histories: Sequence[History], folder: Path
) -> SqliteRestore:
    """Plan a restore into another file, `path`. An empty one gets the tables as they are in the
    file `example`.

    If `example` has another revision than the backup, or lacks a table, this is a plan as
    `for_live` makes it.
    """
    live, model = LiveFile.of(path), LiveFile.of(example)
    is_like = not plans.revision_problems(backup, model.revisions)
    if (
        live.structure.tables
        or not is_like
        or any(model.structure.table(t.name) is None for t in backup.tables)
    ):
        return for_live(backup, path, histories, folder)
    return _planned(
        backup, str(path.absolute()), live, model.structure, MigratedFile(), backup.tables, []
    )


def _left_out(backup: Backup) -> list[str]:
    """The tables that the backup left out, without the ledger's, which a service makes when it
    starts.
    """
    return [name for name in backup.left_out if not is_ledgers(name)]


def _structure(
    backup: Backup, live: LiveFile, histories: Sequence[History], folder: Path
) -> tuple[Structure, MigratedFile]:
    """The tables of the live file, and the tables that it lacks, made by the migrations at the
    backup's revision.
    """
    names = [*(table.name for table in backup.tables), *_left_out(backup)]
    if all(live.structure.table(name) for name in names):
        return live.structure, MigratedFile()
    revisions = backup.header.revisions
    known = {
        history: revisions[history.version_table]
        for history in histories
        if revisions.get(history.version_table) in history.revisions
        and (history.version_table != LEDGERS_MARK or plans.has_ledger(backup))
    }
    if not known:
        return live.structure, MigratedFile()
    path = folder / MIGRATED_FILE
    asyncio.run(_migrate(path, known))
    with closing(opened(path, "mode=rw")) as connection:
        structure = live.structure.with_missing(Structure.of(connection))
    return structure, MigratedFile(
        path, {history.version_table: revision for history, revision in known.items()}
    )


async def _migrate(path: Path, revisions: Mapping[History, str]) -> None:
    database = Database(f"sqlite+aiosqlite:///{path}", setting="DATABASE_URL", pooled=False)
    try:
        for history, revision in revisions.items():
            await migrate(database, history, to=revision)
    finally:
        await database.dispose()


def _planned(
    backup: Backup,
    database: str,
    live: LiveFile,
    structure: Structure,
    migrated: MigratedFile,
    saved: Sequence[SavedTable],
    problems: list[str],
) -> SqliteRestore:
    tables = tuple(
        table
        for table in saved
        if structure.table(table.name) is None or structure.parts(table.name)
    )
    problems = problems + [line for table in tables for line in _shape_problems(table, structure)]
    problems += [
        f"{line}: it needs something that only the application has. {BY_HAND}"
        for line in structure.unmakeable()
    ]
    if not tables:
        problems.append("the backup holds no table")
    header = backup.header
    plan = RestorePlan(
        backup.source.name,
        database,
        header.taken_at,
        header.revision,
        tables,
        live.rows,
        tuple(problems),
        tuple(_notes(backup, live, structure, migrated, tables)),
        is_new=not live.structure.tables,
        holds_ledger=plans.has_ledger(backup),
    )
    return SqliteRestore(plan, structure, live, migrated.path)


def _missing(backup: Backup, names: Sequence[str]) -> list[str]:
    """The problem that neither the live file nor the migrations have these tables; nothing for no
    names.
    """
    if not names:
        return []
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    tables = (
        ("the table " if len(names) == 1 else "the tables ")
        + ", ".join(map(brief, names[:MOST_NAMED]))
        + more
    )
    verb, pronoun = ("is", "it") if len(names) == 1 else ("are", "them")
    return [
        f"{tables} {verb} missing in the database, and in the migrations of this code at the "
        f"backup's revision ({backup.header.revision or 'none'}): let the application make "
        f"{pronoun} by its own migration, then restore. {BY_HAND}"
    ]


def _shape_problems(saved: SavedTable, structure: Structure) -> list[str]:
    table = structure.table(saved.name)
    if table is None:
        return []
    needed = [
        plans.missing_value_problem(name, saved)
        for name in table.needed
        if name not in saved.columns
    ]
    return plans.column_problems(saved, table.columns) + needed


def _notes(
    backup: Backup,
    live: LiveFile,
    structure: Structure,
    migrated: MigratedFile,
    restored: Sequence[SavedTable],
) -> Iterator[str]:
    if migrated.path:
        yield f"missing tables are made as of migration {', '.join(migrated.revisions.values())}"
    names = {table.name for table in restored}
    for table in live.structure.with_rows():
        if table.name not in names and table.name not in live.revisions:
            yield f"{table.name} is not in the backup and stays as it is"
    missing = [
        name
        for name in _left_out(backup)
        if live.structure.tables and structure.table(name) is None
    ]
    for name in missing[:MOST_NAMED]:
        yield (
            f"{brief(name)} is neither in the backup nor in the database: the application's own "
            "migration makes it"
        )
    if len(missing) > MOST_NAMED:
        yield (
            f"{len(missing) - MOST_NAMED:,} more tables are neither in the backup nor in the "
            "database"
        )
