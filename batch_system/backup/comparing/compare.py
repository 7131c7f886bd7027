"""diff(): the differences between a backup and the current database, or between two backups."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sqlalchemy.engine import URL, make_url

from batch_system import clock
from batch_system.backup.comparing import postgresql_rows, sqlite_rows
from batch_system.backup.comparing.differences import Difference, Side, Table
from batch_system.backup.comparing.postgresql_rows import CurrentDatabase
from batch_system.backup.comparing.tally import AFTER, BEFORE
from batch_system.backup.file.format import POSTGRESQL, SQLITE, WORDS
from batch_system.backup.file.progress import BackupMeter
from batch_system.backup.file.reader import Backup
from batch_system.backup.file.selection import Selection
from batch_system.backup.places.place import Places
from batch_system.backup.sqlite.plain_file import unpack
from batch_system.concurrency.stoppable import Stop, in_thread
from batch_system.database.urls import connect_arguments, safe_url
from batch_system.errors import BackupError
from batch_system.settings.settings import Settings

FILES = ("before.sqlite3", "after.sqlite3")


async def diff(settings: Settings, before: str, after: str | None = None) -> Difference:
    """The differences from the backup `before` to the backup `after`, or to the application's
    current database.

    `Places.find` finds the backups. A thread reads them, and nothing is changed. Raises
    BackupError.
    """
    return await in_thread(lambda stop: _diff(settings, before, after, stop))


def _diff(settings: Settings, before: str, after: str | None, stop: Stop) -> Difference:
    with ExitStack() as stack:
        old = stack.enter_context(_opened(settings, before))
        if after is None:
            return _with_database(old, settings, stop)
        new = stack.enter_context(_opened(settings, after))
        _refuse_another_kind(old, new.header.kind, new.source.name)
        if old.header.kind == POSTGRESQL:
            return postgresql_rows.between(old, new, _side(old), _side(new), stop)
        folder = stack.enter_context(_folder())
        files = [
            _extracted(backup, folder / name, stop)
            for backup, name in zip((old, new), FILES, strict=True)
        ]
        ours, theirs = (sqlite_rows.uri(file, is_ours=True) for file in files)
        packed = max(old.source.size, new.source.size)
        with sqlite_rows.attached(ours, theirs, stop, packed) as connection:
            sides = (
                _side(old, sqlite_rows.tables(connection, BEFORE)),
                _side(new, sqlite_rows.tables(connection, AFTER)),
            )
            return sqlite_rows.compare(connection, *sides, stop)


@contextmanager
def _opened(settings: Settings, name: str) -> Iterator[Backup]:
    with Places.of(settings).find(name) as source:
        yield Backup.open(source)


def _with_database(old: Backup, settings: Settings, stop: Stop) -> Difference:
    setting, text = settings.backup_database
    url = make_url(text)
    _refuse_another_kind(old, url.get_backend_name(), f"the database {safe_url(url)} ({setting})")
    if old.header.kind == POSTGRESQL:
        selection = Selection.of(
            settings.BACKUP_INCLUDE, settings.BACKUP_EXCLUDE, settings.BACKUP_LEDGER
        )
        database = CurrentDatabase(
            url.database or "", safe_url(url), setting, connect_arguments(url), selection
        )
        return postgresql_rows.with_database(old, _side(old), database, stop)
    return _with_file(old, url, stop)


def _with_file(old: Backup, url: URL, stop: Stop) -> Difference:
    path = Path(url.database or "")
    if not path.is_file():
        raise BackupError(f"there is no database at {path.absolute()}: look at DATABASE_URL")
    with _folder() as folder:
        ours = sqlite_rows.uri(_extracted(old, folder / FILES[BEFORE], stop), is_ours=True)
        with sqlite_rows.attached(
            ours, sqlite_rows.uri(path, is_ours=False), stop, old.source.size
        ) as connection:
            revisions = sqlite_rows.revisions(connection, AFTER)
            after = Side(
                name=f"the database {path.absolute()}",
                taken_at=clock.now(),
                kind=SQLITE,
                database=path.name,
                revision=revisions.get("alembic_version"),
                revisions=revisions,
                tables=sqlite_rows.tables(connection, AFTER),
            )
            return sqlite_rows.compare(
                connection, _side(old, sqlite_rows.tables(connection, BEFORE)), after, stop
            )


def _refuse_another_kind(old: Backup, kind: str, name: str) -> None:
    if old.header.kind != kind:
        raise BackupError(
            f"{old.source.name} is a backup of {WORDS[old.header.kind]}, but {name} is of "
            f"{WORDS.get(kind, kind)}: "
            "both must be of the same kind"
        )


def _side(backup: Backup, tables: tuple[Table, ...] | None = None) -> Side:
    header = backup.header
    if tables is None:
        tables = tuple(
            Table(table.schema, table.name, table.columns, table.types, table.key)
            for table in backup.tables
        )
    return Side(
        name=backup.source.name,
        taken_at=header.taken_at,
        kind=header.kind,
        database=header.database,
        revision=header.revision,
        revisions=header.revisions,
        tables=tables,
        left_out=frozenset(backup.left_out),
    )


@contextmanager
def _folder() -> Iterator[Path]:
    try:
        with tempfile.TemporaryDirectory(prefix="batch-diff-") as folder:
            yield Path(folder)
    except OSError as error:
        raise BackupError(
            f"the backup could not be unpacked in {tempfile.gettempdir()}: "
            f"{error.strerror or error}. Free some space there, or set TMPDIR to a folder on a "
            "larger disk."
        ) from error


def _extracted(backup: Backup, file: Path, stop: Stop) -> Path:
    """Unpack the database of a SQLite backup into a file, and return it."""
    unpack(backup, file, BackupMeter(None), stop)
    return file
