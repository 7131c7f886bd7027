"""Files in a folder of backups: their names, the reservation of a new name, and advice for errors
of the file system.

A process reserves a name by creating the `.partial` file of that name. No other process can reserve
the name while that file exists, and a process that creates it later finds the finished backup. So
no backup is ever overwritten.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from batch_system.errors import BackupError

STAMP = "%Y%m%d_%H%M%S"
NAME = re.compile(r"backup_([0-9]{8}_[0-9]{6})\.backup\.gz")
PIN = ".pin"
"""Suffix of the small file that pins the backup beside it."""
ABANDONED_AFTER = timedelta(days=1)

_LARGER = "Free some space there, or set BACKUP_DIR to a folder on a larger disk."
_WRITABLE = "Make the folder writable for this user, or set BACKUP_DIR to another one."
_NO_FOLDER = (
    "A file stands where a folder is needed: move it away, or set BACKUP_DIR to another folder."
)
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _LARGER),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _WRITABLE),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), _NO_FOLDER),
}
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""Error numbers of file systems without hard links, such as FAT and some network file systems."""


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn an OSError of the block into a BackupError that names the folder and gives advice."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(
            error.errno or 0, "Look at the disk, or set BACKUP_DIR to another folder."
        )
        raise BackupError(
            f"no backup was made in {folder}: {error.strerror or error}. {advice}"
        ) from error


def taken_at(path: Path) -> datetime | None:
    """The instant in a backup's name, in UTC; None if the name is not exactly that of a backup."""
    match = NAME.fullmatch(path.name)
    if match is None:
        return None
    try:
        return datetime.strptime(match[1], STAMP).replace(tzinfo=UTC)
    except ValueError:
        return None


@dataclass
class Reservation:
    """The name of a new backup: the partial file that is written, and the final path of the
    complete file.
    """

    partial: Path
    final: Path
    published: bool = False

    def take(self) -> bool:
        """Create the partial file. Returns False if another backup has the name."""
        try:
            os.close(os.open(self.partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return False
        if self.final.exists():
            self.partial.unlink()
            return False
        return True

    def publish(self) -> Path:
        """Give the complete file its final name, and return it.

        The name is that of a later second if a file with the reserved name has appeared in the
        folder meanwhile.
        """
        at = taken_at(self.final)
        assert at is not None
        while True:
            try:
                publish(self.partial, self.final)
            except FileExistsError:
                at += timedelta(seconds=1)
                self.final = _reservation(self.final.parent, at).final
                continue
            self.published = True
            return self.final


@contextmanager
def reserve(folder: Path, at: datetime) -> Iterator[Reservation]:
    """Reserve the name of the instant `at`, or of the next second with a free name. An unpublished
    file is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while not (reservation := _reservation(folder, at)).take():
        at += timedelta(seconds=1)
    try:
        yield reservation
    finally:
        # After publishing, a partial file of that name may belong to another process.
        if not reservation.published:
            remove_unfinished(reservation.partial)


def create(path: Path) -> int:
    """Create a file that only this user may read or write, and return its descriptor.

    Raises FileExistsError if a file or a symbolic link has that name.
    """
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_RDWR, 0o600)


def copy_beside(partial: Path) -> Path:
    """Create a file, with a name that can't be guessed, for the copy of the SQLite database to back
    up.
    """
    path = partial.with_suffix(f".copy.{secrets.token_hex(8)}")
    os.close(create(path))
    return path


def remove_unfinished(partial: Path) -> None:
    """Remove the partial file, the copy of the SQLite database, and SQLite's files beside the
    copy.
    """
    for path in (partial, *partial.parent.glob(f"{partial.stem}.copy*")):
        _remove_own(path)


def _reservation(folder: Path, at: datetime) -> Reservation:
    name = f"backup_{at.astimezone(UTC).strftime(STAMP)}"
    return Reservation(folder / f".{name}.partial", folder / f"{name}.backup.gz")


def remove_abandoned(folder: Path, now: datetime) -> None:
    """Remove unfinished files of killed processes: those that have not been written to for a
    day.
    """
    for pattern in (".backup_*.partial", ".backup_*.copy*"):
        for path in folder.glob(pattern):
            _remove_own(path, before=now - ABANDONED_AFTER)


def _remove_own(path: Path, before: datetime | None = None) -> None:
    """Remove the file if this user owns it. In a shared folder, other users may have files with
    such names.
    """
    with suppress(OSError):
        status = path.lstat()
        is_own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        if is_own and (before is None or status.st_mtime < before.timestamp()):
            path.unlink()


def publish(partial: Path, final: Path) -> None:
    """Give a complete file its final name durably. Raises FileExistsError if a file has that name.

    A hard link never overwrites a file, but a rename does. On a file system without hard links, an
    empty file is created under the final name before the rename.
    """
    try:
        os.link(partial, final)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.close(os.open(final, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        try:
            partial.rename(final)
        except OSError:
            final.unlink()
            raise
    partial.unlink(missing_ok=True)
    sync(final.parent)


def sync(folder: Path) -> None:
    """Make changes of names in this folder durable, so that they survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems can't synchronize folders.
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
