"""SQLite: the file of a backup in place of the present one, or its tables in place of those of the same names.

The backup's file is made beside the target and checked. Then SQLite's own backup writes it into the live file, in one
transaction: readers go on with what they see, and a process that is killed on the way leaves the old rows.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

from sqlalchemy.engine import URL

from service import clock
from service.backup import plan as plans
from service.backup import sqlite_tables
from service.backup.count import Report, compared
from service.backup.plainfile import LISTEN_SECONDS, Patience, explained, opened, unpacked
from service.backup.plan import Plan
from service.backup.progress import Meter
from service.backup.reader import Backup, SavedTable
from service.backup.server import Still
from service.backup.tablewise import replace_tables
from service.backup.threads import Stop
from service.database.migrate import History
from service.errors import BackupError

STEP_PAGES = 5000


def plan(backup: Backup, url: URL, stop: Stop, histories: Sequence[History]) -> Plan:
    path = file_of(url)
    with explained(path, stop):
        return _plan(backup, url, path)


def file_of(url: URL) -> Path:
    name = url.database or ":memory:"
    if name == ":memory:" or name.startswith("file:"):
        raise BackupError(f"can't restore into {name!r}: DATABASE_URL must name a file, as in sqlite:///./app.db")
    path = Path(name)
    if not path.parent.is_dir():
        raise BackupError(f"can't restore into {path.absolute()}: make its folder first, or look at DATABASE_URL")
    return path


def _plan(backup: Backup, url: URL, path: Path) -> Plan:
    present: dict[str, dict[str, str]] = {}
    revisions: dict[str, str] = {}
    rows: dict[str, int] = {}
    if path.is_file():
        with closing(opened(path, "mode=rw")) as connection:
            described = sqlite_tables.described(connection)
            revisions = sqlite_tables.revisions(connection)
            needed = {str(table["name"]): _needed(connection, str(table["name"])) for table in described}
        rows = {str(table["name"]): int(table["rows"]) for table in described}
        present = {str(t["name"]): dict(zip(t["columns"], t["types"], strict=True)) for t in described}
    saved = {table.name for table in backup.tables}
    holds_ledger = plans.has_ledger(backup)
    has_kept = holds_ledger and plans.ABOUT_FILES in present
    is_whole = not present or (not backup.left_out and present.keys() <= saved and not has_kept)
    tables = backup.tables if is_whole else plans.restored(backup)
    if not present:
        problems = _problems_of_a_part(backup)
    else:
        problems = plans.other_revisions(backup, revisions)
        if not is_whole:
            problems += [line for table in tables for line in _table_problems(table, present, needed)]
    kept = [] if is_whole else sorted(present.keys() - {table.name for table in tables} - revisions.keys())
    notes = [f"{name} is not in the backup and stays as it is" for name in kept]
    header = backup.header
    return Plan(
        *(backup.source.name, str(path.absolute()), header.taken_at, header.revision, tables, rows),
        tuple(problems),
        tuple(notes),
        is_whole,
        not present,
        holds_ledger,
    )


def _problems_of_a_part(backup: Backup) -> list[str]:
    """Into an empty file goes only what says at which migration it is."""
    missing = sorted(backup.header.revisions.keys() - {table.name for table in backup.tables})
    if not backup.left_out or not missing:
        return []
    return [
        "the database has no table, and the backup holds only a part of them: let the service make them "
        "(`batch serve`), then restore"
    ]


def _needed(connection: sqlite3.Connection, table: str) -> list[str]:
    """The columns that a row must give a value."""
    found = connection.execute(
        'SELECT name FROM pragma_table_xinfo(?) WHERE "notnull" AND dflt_value IS NULL AND hidden = 0 AND NOT pk',
        (table,),
    )
    return [name for (name,) in found]


def _table_problems(table: SavedTable, present: dict[str, dict[str, str]], needed: dict[str, list[str]]) -> list[str]:
    if table.name not in present:
        return [f"the table {table} is missing in the database"]
    more = [plans.needed_problem(name, table) for name in needed[table.name] if name not in table.columns]
    return plans.column_problems(table, present[table.name]) + more


def run(
    backup: Backup,
    url: URL,
    meter: Meter,
    stop: Stop,
    histories: Sequence[History],
    *,
    dry_run: bool,
    still: Still | None,
) -> Report:
    started, path = clock.monotonic(), file_of(url)
    with unpacked(backup, path.parent, meter, stop) as saved, explained(path, stop):
        made = _plan(backup, url, path)
        made.refuse()
        if made.is_whole:
            _fit(saved, path)
            after = {table.name: table.rows for table in made.tables}  # as the check of the file has counted
            counted = compared(made.backup, made.tables, made.rows, after)
            if not dry_run:
                _replace(saved, path, meter, stop, still)
        else:
            counted = replace_tables(saved, path, made, meter, stop, dry_run=dry_run, still=still)
    return Report(made.backup, made.database, counted, clock.monotonic() - started, dry_run, made.notes)


def _fit(saved: Path, path: Path) -> None:
    """Give the file the page size of the one that it goes into: SQLite can't change that of a file in WAL mode."""
    if not path.is_file():
        return
    with closing(opened(path, "mode=rw")) as live, closing(opened(saved, "mode=rw")) as connection:
        (wanted,), (present,) = (c.execute("PRAGMA page_size").fetchone() for c in (live, connection))
        if wanted != present:
            connection.execute(f"PRAGMA page_size = {wanted}")
            connection.execute("VACUUM")


def _replace(saved: Path, path: Path, meter: Meter, stop: Stop, still: Still | None) -> None:
    meter.begin("restoring", saved.stat().st_size)
    left, asked, patience = 0, still is None, Patience(path, stop)
    with closing(opened(saved, "mode=ro")) as source, closing(opened(path, "mode=rwc", LISTEN_SECONDS)) as live:
        (page_size,), (pages,) = (source.execute(f"PRAGMA {name}").fetchone() for name in ("page_size", "page_count"))

        def step(status: int, remaining: int, _: int) -> None:
            nonlocal left, asked
            if status == sqlite3.SQLITE_DONE:  # it has committed
                return
            stop.check()
            if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                patience.again()
                return
            if not asked and still is not None:  # from the first step on nobody else can write
                asked = True
                asyncio.run(still())
            meter.add((left - remaining) * page_size if left else 0)
            left = remaining

        # The last step commits, so there are at least two.
        source.backup(live, pages=max(1, min(STEP_PAGES, pages - 1)), progress=step)
        with suppress(sqlite3.Error):  # the rows are there, whatever becomes of this
            live.execute("PRAGMA wal_checkpoint(PASSIVE)")
