"""Unpacks the SQLite file in a backup into a private folder, and opens it with protections for
untrusted files.

The schema of a file from elsewhere may hold anything: views, triggers, generated columns and
functions in checks.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from batch_system import clock
from batch_system.backup.file import sqlite_pages
from batch_system.backup.file.folder import STAMP, create
from batch_system.backup.file.format import DATABASE
from batch_system.backup.file.progress import BackupMeter
from batch_system.backup.file.reader import Backup
from batch_system.concurrency.stoppable import Stop
from batch_system.errors import BackupError, DamagedBackup

CHECK_EVERY_INSTRUCTIONS = 100_000
BUSY_SECONDS = 10.0
LISTEN_SECONDS = 0.1
"""How long one try to get a lock waits. A cancel is noticed between two tries."""
PREFIX = ".restore_"
OURS = re.compile(rf"{re.escape(PREFIX)}[0-9]{{8}}_[0-9]{{6}}_\w+")
LARGEST_VALUE = 64 * 1024 * 1024
"""Largest value in bytes of a file from elsewhere, or the size of the packed backup if that is
larger.
"""
LARGEST_STATEMENT = 4 * 1024 * 1024

BY_HAND = (
    "If you trust the backup, you can extract the whole database from it, while nothing uses the "
    "file: "
    "tar xzOf FILE database.sqlite3 > app.db"
)

_ROWS = {
    sqlite3.SQLITE_CONSTRAINT: "The table refuses a row of the backup: its constraints have "
    "changed since.",
    sqlite3.SQLITE_TOOBIG: f"A value is larger than a file from elsewhere may have. {BY_HAND}",
    **dict.fromkeys(
        (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB), "The file is damaged: use another backup."
    ),
}
_ADVICE = {
    sqlite3.SQLITE_FULL: "Free some space on its disk.",
    sqlite3.SQLITE_IOERR: "Look at the space and the health of its disk.",
    sqlite3.SQLITE_BUSY: "Another program holds it: end that, or try again later.",
    sqlite3.SQLITE_READONLY: "Make the file and its folder writable for this user.",
    sqlite3.SQLITE_CANTOPEN: "Make the file and its folder writable for this user.",
}


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A new folder inside this one that only this user may enter. It is removed with its content
    afterwards.

    Such folders of processes that were killed are removed first.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        path, descriptor = _locked_folder(folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def _locked_folder(folder: Path) -> tuple[Path, int]:
    """Create the folder and lock it, so that other processes see that it is in use. Returns it and
    its descriptor.
    """
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{clock.now().strftime(STAMP)}_", dir=folder))
        with suppress(FileNotFoundError):
            descriptor = _opened_folder(path)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists():  # otherwise another process removed it before it was locked
                return path, descriptor
            os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    """Remove the folders with such names that this user owns and that no process has locked."""
    for path in folder.glob(f"{PREFIX}*"):
        if OURS.fullmatch(path.name):
            with suppress(OSError):
                _remove(path)


def _remove(path: Path) -> None:
    descriptor = _opened_folder(path)
    try:
        if os.fstat(descriptor).st_uid == os.geteuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
    finally:
        os.close(descriptor)


def _opened_folder(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def unpack(backup: Backup, path: Path, meter: BackupMeter, stop: Stop, copies: int = 1) -> None:
    """Write the database file of a backup to `path`, in a folder of this process's own.

    Raises BackupError before the first byte is written if it is not a SQLite database, or if the
    disk has no room for `copies` copies of it.
    """
    size = sum(member.bytes for member in backup.members if member.name == DATABASE)
    pieces = backup.pieces()
    first = next(pieces, b"")
    with _refused_as_damage(backup):
        layout = sqlite_pages.layout(first)
        layout.refuse_another_size(size)
    try:
        _refuse_no_room(backup, path.parent, copies * size)
        meter.begin("unpacking", size)
        with open(create(path), "wb") as file:
            for piece in chain((first,), pieces):
                stop.check()
                file.write(piece)
                meter.add(len(piece))
    except OSError as error:
        raise _unwritable(path.parent.parent, error) from error
    with _refused_as_damage(backup):
        sqlite_pages.refuse_large_schema(path, layout.page_size)


def _refuse_no_room(backup: Backup, folder: Path, size: int) -> None:
    if (free := shutil.disk_usage(folder).free) < size:
        raise BackupError(
            f"the backup {backup.source.name} needs {size:,} bytes in {folder.parent}, where "
            f"{free:,} are free, and nothing was changed. Free some space there"
        )


@contextmanager
def _refused_as_damage(backup: Backup) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DamagedBackup(
            f"the database in the backup {backup.source.name} is damaged, and nothing was changed: "
            f"{error}. Use another backup"
        ) from error


def _unwritable(folder: Path, error: OSError) -> BackupError:
    return BackupError(
        f"the backup can't be unpacked in {folder}, and nothing was changed: "
        f"{error.strerror or error}. Make room there, and make it writable for this user"
    )


def opened(path: Path, mode: str, wait: float = BUSY_SECONDS) -> sqlite3.Connection:
    """A connection to the file. `mode`: parameters of SQLite's URI. `wait`: how many seconds it
    waits for a lock.
    """
    return sqlite3.connect(uri_of(path, mode), uri=True, timeout=wait, isolation_level=None)


def uri_of(path: Path, mode: str) -> str:
    return f"{path.absolute().as_uri()}?{mode}"


def guard(connection: sqlite3.Connection, packed: int, *, defensive: bool = True) -> None:
    """Protect a connection before an untrusted file is opened or attached, as SQLite's
    documentation advises.

    Views and triggers are never executed, and the sizes of values and statements are bounded.
    `packed`: the bytes of the backup. `defensive` has an effect from Python 3.12 on; it refuses
    writes to the tables of a full-text index.
    """
    for setting in ("trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0"):
        connection.execute(f"PRAGMA {setting}")
    if sys.version_info >= (3, 12):
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, defensive)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, max(LARGEST_VALUE, packed))
    connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, LARGEST_STATEMENT)
    connection.set_authorizer(_allow_no_views)


def _allow_no_views(action: int, first: Any, second: Any, schema: Any, inside: str | None) -> int:
    """SQLite's authorizer. `inside`: the view or trigger whose SQL requests the action."""
    return sqlite3.SQLITE_OK if inside is None else sqlite3.SQLITE_DENY


class Patience:
    """Limits how long a restore waits for the write lock of a file."""

    def __init__(self, path: Path, stop: Stop) -> None:
        self._path = path
        self._stop = stop
        self._until = clock.monotonic() + BUSY_SECONDS

    def again(self) -> None:
        """Call this before each new attempt. Raises BackupError when BUSY_SECONDS have passed, and
        Stopped.
        """
        self._stop.check()
        if clock.monotonic() >= self._until:
            raise BackupError(
                f"nothing was restored into {self._path.absolute()}: another program has held its "
                f"write lock for {BUSY_SECONDS:g} s. End that program, or try again later"
            )


@contextmanager
def explained(path: Path, stop: Stop) -> Iterator[None]:
    """Turn an error of SQLite in the block into a BackupError with advice."""
    try:
        yield
    except sqlite3.Error as error:
        stop.check()
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        advice = _ADVICE.get(
            code, "Check that it is a SQLite database which this user may write to."
        )
        raise BackupError(
            f"nothing was restored into {path.absolute()}: {error}. {advice}"
        ) from error


@contextmanager
def loading(backup: Backup, what: str, stop: Stop) -> Iterator[None]:
    """Turn an error of SQLite about damaged or refused rows of the backup into a DamagedBackup.

    `what`: the loaded part of the backup, for the message.
    """
    try:
        yield
    except sqlite3.Error as error:
        stop.check()
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code not in _ROWS:
            raise
        raise DamagedBackup(
            f"{what} in the backup {backup.source.name} can't be loaded, and nothing was changed: "
            f"{error}. {_ROWS[code]}"
        ) from error
