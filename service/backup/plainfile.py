"""SQLite: the database file that a backup holds, unpacked, checked and counted, and removed afterwards."""

from __future__ import annotations

import fcntl
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from service import clock
from service.backup import sqlite_tables
from service.backup.folder import STAMP
from service.backup.progress import Meter
from service.backup.reader import Backup
from service.backup.threads import Stop
from service.errors import BackupError, DamagedBackup

CHECK_EVERY_INSTRUCTIONS = 100_000
BUSY_SECONDS = 10.0
LISTEN_SECONDS = 0.1
"""So long at once does it wait for a lock: a cancel is heard between two waits."""
SUFFIX = ".restore"
OURS = re.compile(rf"\.[0-9]{{8}}_[0-9]{{6}}_[0-9]+{re.escape(SUFFIX)}")
BESIDE = ("-journal", "-wal", "-shm")

_ADVICE = {
    sqlite3.SQLITE_FULL: "Free some space on its disk.",
    sqlite3.SQLITE_IOERR: "Look at the space and the health of its disk.",
    sqlite3.SQLITE_CONSTRAINT: "The table refuses a row of the backup: its constraints are others by now.",
    sqlite3.SQLITE_BUSY: "Another program holds it: end that, or try again later.",
    sqlite3.SQLITE_READONLY: "Make the file and its folder writable for this user.",
    sqlite3.SQLITE_CANTOPEN: "Make the file and its folder writable for this user.",
}


@contextmanager
def unpacked(backup: Backup, folder: Path, meter: Meter, stop: Stop) -> Iterator[Path]:
    """The file, whole and sound. Those of processes that were killed are removed first."""
    _remove_abandoned(folder)
    path = folder / f".{clock.now().strftime(STAMP)}_{os.getpid()}{SUFFIX}"
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        _unpack(backup, path, meter, stop)
        with explained(path, stop):
            _refuse_damage(backup, path, stop)
        yield path
    finally:
        for name in (path, *(path.with_name(path.name + more) for more in BESIDE)):
            name.unlink(missing_ok=True)
        os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    """What nobody holds a lock on."""
    for path in filter(lambda path: OURS.fullmatch(path.name), folder.glob(f".*{SUFFIX}")):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            for more in BESIDE:
                path.with_name(path.name + more).unlink(missing_ok=True)


def _unpack(backup: Backup, path: Path, meter: Meter, stop: Stop) -> None:
    meter.begin("unpacking", sum(member.bytes for member in backup.members))
    try:
        with path.open("r+b") as file:
            for piece in backup.pieces():
                stop.check()
                file.write(piece)
                meter.add(len(piece))
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> BackupError:
    return BackupError(
        f"the backup can't be unpacked in {folder}, and nothing was changed: {error.strerror or error}. Make room "
        "there, and make it writable for this user"
    )


def _refuse_damage(backup: Backup, path: Path, stop: Stop) -> None:
    """SQLite's own check, and whether each table has the rows that the manifest counts."""
    with closing(opened(path, "mode=rw")) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")  # so that it is one file, whatever it was before
        connection.set_progress_handler(stop.asked, CHECK_EVERY_INSTRUCTIONS)
        if damage := sqlite_tables.damage(connection):
            raise DamagedBackup(
                f"the database in the backup {backup.source.name} is damaged, and nothing was changed: "
                f"{damage}. Use another backup"
            )
        rows = counts(connection)
    for table in backup.tables:
        if rows.get(table.name) != table.rows:
            raise DamagedBackup(
                f"{table} has {rows.get(table.name, 'no')} rows in the backup {backup.source.name}, whose manifest "
                f"counts {table.rows}; nothing was changed. Use another backup"
            )


def counts(connection: sqlite3.Connection) -> dict[str, int]:
    """The rows of each table."""
    return {str(table["name"]): int(table["rows"]) for table in sqlite_tables.described(connection)}


def opened(path: Path, mode: str, wait: float = BUSY_SECONDS) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?{mode}"
    return sqlite3.connect(uri, uri=True, timeout=wait, isolation_level=None)


class Patience:
    """How long is waited for a file's write lock."""

    def __init__(self, path: Path, stop: Stop) -> None:
        self._path = path
        self._stop = stop
        self._until = clock.monotonic() + BUSY_SECONDS

    def again(self) -> None:
        """It was taken. Raises BackupError when that goes on for too long."""
        self._stop.check()
        if clock.monotonic() >= self._until:
            raise BackupError(
                f"nothing was restored into {self._path.absolute()}: another program has held its write lock for "
                f"{BUSY_SECONDS:g} s. End that, or try again when it is over"
            )


@contextmanager
def explained(path: Path, stop: Stop) -> Iterator[None]:
    """The one place where an error of SQLite becomes ours."""
    try:
        yield
    except sqlite3.Error as error:
        stop.check()
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        advice = _ADVICE.get(code, "Check that it is a SQLite database which this user may write to.")
        raise BackupError(f"nothing was restored into {path.absolute()}: {error}. {advice}") from error
