"""SQLite: a copy by the online backup API, checked, then compressed.

Writers go on meanwhile (in WAL mode, which get_db() sets). The copy lies uncompressed beside the backup for as long
as it is needed, so the folder needs room for both.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy.engine import URL

from service.backup.archive import PART_BYTES, Archive
from service.backup.threads import Stop
from service.errors import BackupError

STEP_PAGES = 2000
BUSY_SECONDS = 10.0
CHECK_EVERY_INSTRUCTIONS = 100_000
MEMBER = "database.sqlite3"

_ADVICE = {
    sqlite3.SQLITE_FULL: "Free some space there, or set BACKUP_DIR to a folder on a larger disk.",
    sqlite3.SQLITE_IOERR: "Look at the space and the health of both disks, or set BACKUP_DIR to another folder.",
    sqlite3.SQLITE_BUSY: "Another program holds the database: end it, or try again later.",
}


def write(url: URL, archive: Archive, stop: Stop) -> None:
    source = _file_of(url)
    with _copy(source, archive.path.with_suffix(".copy"), stop) as copy:
        size = copy.stat().st_size
        archive.add_header("sqlite", database=source.name, server_version=sqlite3.sqlite_version)
        archive.add_file(MEMBER, size, _pieces(copy, stop))
        archive.finish(database=MEMBER)


def _file_of(url: URL) -> Path:
    name = url.database or ":memory:"
    if name == ":memory:" or name.startswith("file:"):
        raise BackupError(f"can't back up {name!r}: DATABASE_URL must name a file, as in sqlite:///./app.db")
    path = Path(name)
    if not path.is_file():
        raise BackupError(f"there is no database at {path.absolute()}: look at DATABASE_URL")
    return path


@contextmanager
def _copy(source: Path, copy: Path, stop: Stop) -> Iterator[Path]:
    """A sound copy of the database in a file that is removed afterwards."""
    try:
        os.close(os.open(copy, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600))
        with _explained(source, copy.parent, stop):
            _copy_pages(source, copy, stop)
            _refuse_damage(source, copy, stop)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def _copy_pages(source: Path, copy: Path, stop: Stop) -> None:
    with closing(_open(source, "mode=rw")) as reading, closing(_open(copy, "mode=rw")) as writing:
        # Without an open read transaction each commit of another connection would start the copy anew, for ever.
        reading.execute("BEGIN")
        if reading.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table'").fetchone() == (0,):
            raise BackupError(f"there is no table in the database {source.absolute()}: look at DATABASE_URL")
        writing.execute("PRAGMA journal_mode = OFF")
        writing.execute("PRAGMA synchronous = OFF")
        reading.backup(writing, pages=STEP_PAGES, progress=lambda *_: stop.check())


def _refuse_damage(source: Path, copy: Path, stop: Stop) -> None:
    with closing(_open(copy, "mode=ro&immutable=1")) as connection:
        connection.set_progress_handler(stop.asked, CHECK_EVERY_INSTRUCTIONS)
        (result,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if result != "ok":
        raise BackupError(
            f"the database {source.absolute()} is damaged, so it was not backed up: {result.splitlines()[-1]}. "
            "Restore an older backup, or save what can be read with sqlite3's .recover."
        )


def _open(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?{mode}"
    return sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)


@contextmanager
def _explained(source: Path, folder: Path, stop: Stop) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        stop.check()
        primary_code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        advice = _ADVICE.get(primary_code, "Check that it is a SQLite database which this user may read.")
        message = f"the database {source.absolute()} could not be copied into {folder}: {error}. {advice}"
        raise BackupError(message) from error


def _pieces(path: Path, stop: Stop) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PART_BYTES):
            stop.check()
            yield piece
