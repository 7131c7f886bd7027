"""Backs up an SQLite database: copies it by the online backup API, and compresses the copy while
checking it.

Other connections can write meanwhile, because get_db() sets WAL mode. The uncompressed copy lies
beside the backup until the backup is complete, so the folder needs room for both.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from batch_system.backup.file.folder import copy_beside
from batch_system.backup.file.format import DATABASE, PIECE_BYTES, SQLITE, tool
from batch_system.backup.file.progress import BackupMeter
from batch_system.backup.file.selection import Selection
from batch_system.backup.file.writer import Archive, refuse_size
from batch_system.backup.making.request import BackupRequest
from batch_system.backup.sqlite import tables as sqlite_tables
from batch_system.concurrency.stoppable import Stop
from batch_system.errors import BackupError

STEP_PAGES = 2000
BUSY_SECONDS = 10.0
CHECK_EVERY_INSTRUCTIONS = 100_000

_DAMAGED = "Restore an older backup, or save what can be read with sqlite3's .recover."
_DAMAGED_INDEX = "Rebuild its indexes by sqlite3's REINDEX."
_ADVICE = {
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_FULL: "Free some space there, or set BACKUP_DIR to a folder on a larger disk.",
    sqlite3.SQLITE_IOERR: "Look at the space and the health of both disks, or set BACKUP_DIR to "
    "another folder.",
    sqlite3.SQLITE_BUSY: "Another program holds the database: end it, or try again later.",
}


def write(request: BackupRequest, archive: Archive, meter: BackupMeter, stop: Stop) -> None:
    """Write the requested database into the archive. Raises BackupError; Stopped after a request to
    stop.
    """
    source = file_of(request.database)
    refuse_size(source.stat().st_size)
    with _copy(source, copy_beside(archive.path), request.selection, meter, stop) as (copy, facts):
        header = {"server_version": sqlite3.sqlite_version, "tool": tool(), **facts.pop("header")}
        archive.add_header(SQLITE, database=source.name, **header)
        size = copy.stat().st_size
        archive.refuse_too_large(size, **facts, sequences=[])
        meter.begin("packing", size)
        with ThreadPoolExecutor(1, thread_name_prefix="backup-check") as executor:
            check = executor.submit(_refuse_damage, source, copy, stop)
            archive.add_file(DATABASE, size, _pieces(copy, meter, stop))
            check.result()
        archive.finish(**facts, sequences=[])


def file_of(name: str) -> Path:
    """The path of the database file; `name` is the part of the URL that SQLAlchemy calls
    `database`.

    Raises BackupError if it names no file that exists.
    """
    if name in ("", ":memory:") or name.startswith("file:"):
        raise BackupError(
            f"can't back up {name or ':memory:'!r}: DATABASE_URL must name a file, as in "
            "sqlite:///./app.db"
        )
    path = Path(name)
    if not path.is_file():
        raise BackupError(f"there is no database at {path.absolute()}: look at DATABASE_URL")
    return path


@contextmanager
def _copy(
    source: Path, copy: Path, selection: Selection, meter: BackupMeter, stop: Stop
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Copy the database, yield the copy and the facts about its tables, and remove the copy
    afterwards.
    """
    try:
        with _explained(source, copy.parent, stop):
            _copy_pages(source, copy, meter, stop)
            facts = _choose(copy, selection, stop)
        yield copy, facts
    finally:
        copy.unlink(missing_ok=True)


def _copy_pages(source: Path, copy: Path, meter: BackupMeter, stop: Stop) -> None:
    with closing(_open(source, "mode=rw")) as reading, closing(_open(copy, "mode=rw")) as writing:
        # Without an open read transaction each commit of another connection would restart the copy.
        reading.execute("BEGIN")
        if reading.execute(
            "SELECT count(*) FROM sqlite_master WHERE type = 'table'"
        ).fetchone() == (0,):
            raise BackupError(
                f"there is no table in the database {source.absolute()}: look at DATABASE_URL"
            )
        (page_size,), (pages,) = (
            reading.execute(f"PRAGMA {name}").fetchone() for name in ("page_size", "page_count")
        )
        meter.begin("copying", page_size * pages)
        left = pages

        def step(_: int, remaining: int, __: int) -> None:
            nonlocal left
            stop.check()
            meter.add((left - remaining) * page_size)
            left = remaining

        writing.execute("PRAGMA journal_mode = OFF")
        writing.execute("PRAGMA synchronous = OFF")
        reading.backup(writing, pages=STEP_PAGES, progress=step)


def _refuse_damage(source: Path, copy: Path, stop: Stop) -> None:
    """Raise BackupError for damage that a restore would refuse.

    That includes an index that does not fit its table, which quick_check does not find.
    """
    with (
        _explained(source, copy.parent, stop),
        closing(_open(copy, "mode=ro&immutable=1")) as connection,
    ):
        connection.set_progress_handler(stop.is_requested, CHECK_EVERY_INSTRUCTIONS)
        cause = sqlite_tables.damage(connection)
    if cause:
        advice = _DAMAGED_INDEX if " index " in cause else _DAMAGED
        raise BackupError(
            f"the database {source.absolute()} is damaged, so it was not backed up: {cause}. "
            f"{advice}"
        )


def _choose(copy: Path, selection: Selection, stop: Stop) -> dict[str, Any]:
    """Drop the tables that the selection leaves out, and return the facts about the other
    tables.
    """
    with closing(_open(copy, "mode=ro&immutable=1")) as connection:
        revisions = sqlite_tables.revisions(connection)
        unwanted = sqlite_tables.unwanted(connection, selection)
    if unwanted:
        with closing(_open(copy, "mode=rw")) as connection:
            connection.set_progress_handler(stop.is_requested, CHECK_EVERY_INSTRUCTIONS)
            sqlite_tables.drop(connection, unwanted)
    with closing(_open(copy, "mode=ro&immutable=1")) as connection:
        connection.set_progress_handler(stop.is_requested, CHECK_EVERY_INSTRUCTIONS)
        tables = sqlite_tables.described(connection)
    header = {"revisions": revisions, "revision": revisions.get("alembic_version")}
    return {"header": header, "tables": tables, "left_out": unwanted}


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
        advice = _ADVICE.get(
            primary_code, "Check that it is a SQLite database which this user may read."
        )
        message = (
            f"the database {source.absolute()} could not be copied into {folder}: {error}. {advice}"
        )
        raise BackupError(message) from error


def _pieces(path: Path, meter: BackupMeter, stop: Stop) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            stop.check()
            meter.add(len(piece))
            yield piece
