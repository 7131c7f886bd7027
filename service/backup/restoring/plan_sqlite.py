"""SQLite: which tables a restore makes, of whose text, and every reason to refuse it.

A table is made as it is in the live file, or as our migrations make it at the backup's revision. The backup's own
schema is the text of whoever wrote the file, and none of it is used.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from service.backup.file.reader import Backup, SavedTable
from service.backup.file.selection import LEDGERS_MARK, is_ledgers
from service.backup.restoring import plan as plans
from service.backup.restoring.plan import Plan
from service.backup.restoring.revisions import of_backup, with_data
from service.backup.sqlite import tables as sqlite_tables
from service.backup.sqlite.new_file import LIVE, file_settings
from service.backup.sqlite.plain_file import BY_HAND, opened
from service.backup.sqlite.structure import Structure
from service.database.engine import Database
from service.database.migrate import History, migrate
from service.escaping import brief

MADE_FILE = "made.sqlite3"
A_TEMPORARY_FILE = "a temporary file"
MOST_NAMED = 5


@dataclass(frozen=True)
class Live:
    """What is there now: nothing where there is no file, or no table in it. `rows` by the table's name."""

    structure: Structure = field(default_factory=Structure)
    rows: dict[str, int] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, int | str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> Live:
        if not path.is_file():
            return cls()
        with closing(opened(path, "mode=rw")) as connection:
            rows = {str(table["name"]): int(table["rows"]) for table in sqlite_tables.described(connection)}
            structure = Structure.of(connection)
            revisions = with_data(sqlite_tables.revisions(connection), rows)
            return cls(structure, rows, revisions, file_settings(connection)) if structure.tables else cls()


@dataclass(frozen=True)
class Made:
    """A file with the tables of our migrations, and at which revision they are, by the version table."""

    path: Path | None = None
    revisions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """`made`: a file with the tables of our migrations; None where none of them is missing."""

    plan: Plan
    structure: Structure
    live: Live
    made: Path | None

    def kept(self, schema: str) -> list[str]:
        """The tables that are not restored: those of the live file, or those that the migrations made."""
        restored = {table.name for table in self.plan.tables}
        live = {table.name for table in self.live.structure.tables}
        return [
            table.name
            for table in self.structure.with_rows()
            if table.name not in restored and (table.name in live) == (schema == LIVE)
        ]


def for_live(backup: Backup, path: Path, histories: Sequence[History], folder: Path) -> Work:
    """`folder`: of our own, for what the migrations make."""
    live, tables = Live.of(path), plans.restored(backup)
    structure, made = _structure(backup, live, histories, folder)
    if live.structure.tables:
        problems = plans.other_revisions(backup, {**made.revisions, **live.revisions})
        problems += _missing(backup, [t.name for t in tables if structure.table(t.name) is None])
    else:
        needed = [*(table.name for table in backup.tables), *_left_out(backup)]
        problems = _missing(backup, [name for name in needed if structure.table(name) is None])
    return _work(backup, str(path.absolute()), live, structure, made, tables, problems)


def for_drill(backup: Backup, path: Path | None, histories: Sequence[History], folder: Path) -> Work:
    """Into an empty file. Tables are made as they are in the live file `path`, if that is at the same revision."""
    live = Live.of(path) if path else Live()
    if plans.other_revisions(backup, live.revisions):
        live = Live()
    structure, made = _structure(backup, live, histories, folder)
    problems = _missing(backup, [t.name for t in backup.tables if structure.table(t.name) is None])
    work = _work(backup, A_TEMPORARY_FILE, live, structure, made, backup.tables, problems)
    return replace(work, plan=replace(work.plan, rows={}, notes=()))


def _left_out(backup: Backup) -> list[str]:
    """Without the ledger's: a service makes it anew when it starts."""
    return [name for name in backup.left_out if not is_ledgers(name)]


def _structure(backup: Backup, live: Live, histories: Sequence[History], folder: Path) -> tuple[Structure, Made]:
    """The live file's tables, and those that it lacks as the migrations make them at the backup's revision."""
    names = [*(table.name for table in backup.tables), *_left_out(backup)]
    if all(live.structure.table(name) for name in names):
        return live.structure, Made()
    revisions = of_backup(backup)
    known = {
        history: revisions[history.version_table]
        for history in histories
        if revisions.get(history.version_table) in history.revisions
        and (history.version_table != LEDGERS_MARK or plans.has_ledger(backup))
    }
    if not known:
        return live.structure, Made()
    path = folder / MADE_FILE
    asyncio.run(_migrate(path, known))
    with closing(opened(path, "mode=rw")) as connection:
        structure = live.structure.with_missing(Structure.of(connection))
    return structure, Made(path, {history.version_table: revision for history, revision in known.items()})


async def _migrate(path: Path, revisions: Mapping[History, str]) -> None:
    database = Database(f"sqlite+aiosqlite:///{path}", setting="DATABASE_URL", pooled=False)
    try:
        for history, revision in revisions.items():
            await migrate(database, history, to=revision)
    finally:
        await database.dispose()


def _work(
    backup: Backup,
    database: str,
    live: Live,
    structure: Structure,
    made: Made,
    wanted: Sequence[SavedTable],
    problems: list[str],
) -> Work:
    tables = tuple(table for table in wanted if structure.table(table.name) is None or structure.parts(table.name))
    problems = problems + [line for table in tables for line in _shape_problems(table, structure)]
    problems += [f"{line}: it needs what only the application has. {BY_HAND}" for line in structure.unmakeable()]
    if not tables:
        problems.append("it holds no table")
    header = backup.header
    plan = Plan(
        *(backup.source.name, database, header.taken_at, header.revision, tables, live.rows),
        tuple(problems),
        tuple(_notes(backup, live, structure, made, tables)),
        is_new=not live.structure.tables,
        holds_ledger=plans.has_ledger(backup),
    )
    return Work(plan, structure, live, made.path)


def _missing(backup: Backup, names: Sequence[str]) -> list[str]:
    """Tables that nobody here can make."""
    if not names:
        return []
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    tables = ("the table " if len(names) == 1 else "the tables ") + ", ".join(map(brief, names[:MOST_NAMED])) + more
    is_or_are, it = ("is", "it") if len(names) == 1 else ("are", "them")
    return [
        f"{tables} {is_or_are} missing in the database, and in the migrations of this code at the backup's revision "
        f"({backup.header.revision or 'none'}): let the application make {it}, by its own migration, and restore "
        f"then. {BY_HAND}"
    ]


def _shape_problems(saved: SavedTable, structure: Structure) -> list[str]:
    table = structure.table(saved.name)
    if table is None:
        return []
    needed = [plans.needed_problem(name, saved) for name in table.needed if name not in saved.columns]
    return plans.column_problems(saved, table.columns) + needed


def _notes(
    backup: Backup, live: Live, structure: Structure, made: Made, restored: Sequence[SavedTable]
) -> Iterator[str]:
    if made.path:
        yield f"tables that are missing are made as of migration {', '.join(made.revisions.values())}"
    names = {table.name for table in restored}
    for table in live.structure.with_rows():
        if table.name not in names and table.name not in live.revisions:
            yield f"{table.name} is not in the backup and stays as it is"
    missing = [name for name in _left_out(backup) if live.structure.tables and structure.table(name) is None]
    for name in missing[:MOST_NAMED]:
        yield f"{brief(name)} is neither in the backup nor in the database: the application's own migration makes it"
    if len(missing) > MOST_NAMED:
        yield f"and so are {len(missing) - MOST_NAMED:,} more tables"
