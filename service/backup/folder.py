"""The folder of backups: names, a place for a new one, and what to say when the file system refuses.

A name belongs to whoever creates its `.partial` file. As long as that exists nobody else can take the name, and
whoever creates it afterwards finds the finished backup: so two processes never write over each other.
"""

from __future__ import annotations

import errno
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from service.errors import BackupError

STAMP = "%Y%m%d_%H%M%S"
NAME = re.compile(r"backup_([0-9]{8}_[0-9]{6})\.backup\.gz")
ABANDONED_AFTER = timedelta(days=1)

_LARGER = "Free some space there, or set BACKUP_DIR to a folder on a larger disk."
_WRITABLE = "Make the folder writable for this user, or set BACKUP_DIR to another one."
_NO_FOLDER = "A file stands where a folder is needed: move it away, or set BACKUP_DIR to another folder."
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _LARGER),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _WRITABLE),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), _NO_FOLDER),
}


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """An OSError of the block becomes a BackupError that names the folder and says what to do."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "Look at the disk, or set BACKUP_DIR to another folder.")
        raise BackupError(f"no backup was made in {folder}: {error.strerror or error}. {advice}") from error


def taken_at(path: Path) -> datetime | None:
    """The instant in a backup's name; None when the name is not exactly one of ours."""
    match = NAME.fullmatch(path.name)
    if match is None:
        return None
    try:
        return datetime.strptime(match[1], STAMP).replace(tzinfo=UTC)
    except ValueError:
        return None


@dataclass
class Place:
    """Where a new backup is written, and the name that it gets when it is complete."""

    partial: Path
    final: Path
    published: bool = False

    def take(self) -> bool:
        """Create the partial file; False when the name belongs to another backup."""
        try:
            os.close(os.open(self.partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return False
        if self.final.exists():
            self.partial.unlink()
            return False
        return True

    def publish(self) -> Path:
        self.partial.rename(self.final)
        self.published = True
        _sync(self.final.parent)
        return self.final


@contextmanager
def reserve(folder: Path, at: datetime) -> Iterator[Place]:
    """A place named after `at`, or after the next second that is free. What is not published is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    while not (place := _place(folder, at)).take():
        at += timedelta(seconds=1)
    try:
        yield place
    finally:
        if not place.published:  # else a file of that name is another process's by now
            remove_unfinished(place.partial)


def create(path: Path) -> int:
    """A new file for this user alone, as a descriptor. Raises FileExistsError, also where a link stands."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_RDWR, 0o600)


def copy_beside(partial: Path) -> Path:
    """A new file for the copy of SQLite's database of which the backup is made. Nobody can guess its name."""
    path = partial.with_suffix(f".copy.{secrets.token_hex(8)}")
    os.close(create(path))
    return path


def remove_unfinished(partial: Path) -> None:
    """With the copy, and what SQLite may have beside that."""
    partial.unlink(missing_ok=True)
    for path in partial.parent.glob(f"{partial.stem}.copy*"):
        _remove_own(path)


def _remove_own(path: Path, before: float = math.inf) -> None:
    """A file of this user's that was last written before this instant. Nothing else that has such a name."""
    with suppress(OSError):
        facts = path.lstat()
        if stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid() and facts.st_mtime < before:
            path.unlink()


def _place(folder: Path, at: datetime) -> Place:
    name = f"backup_{at.astimezone(UTC).strftime(STAMP)}"
    return Place(folder / f".{name}.partial", folder / f"{name}.backup.gz")


def remove_abandoned(folder: Path, now: datetime) -> None:
    """Remove what a process that was killed left behind: nothing has been written to it for a day."""
    limit = (now - ABANDONED_AFTER).timestamp()
    for pattern in (".backup_*.partial", ".backup_*.copy*"):
        for path in folder.glob(pattern):
            _remove_own(path, before=limit)


def _sync(folder: Path) -> None:
    """Make a rename in this folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # some network file systems don't know it for folders
            raise
    finally:
        os.close(descriptor)
