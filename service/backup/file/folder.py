"""The folder of backups: names, a place for a new one, and what to say when the file system refuses.

A name belongs to whoever creates its `.partial` file. As long as that exists nobody else can take the name, and
whoever creates it afterwards finds the finished backup: so two processes never write over each other.
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

from service.errors import BackupError

STAMP = "%Y%m%d_%H%M%S"
NAME = re.compile(r"backup_([0-9]{8}_[0-9]{6})\.backup\.gz")
PIN = ".pin"
"""What the name of the small file ends with that pins the backup beside it."""
ABANDONED_AFTER = timedelta(days=1)

_LARGER = "Free some space there, or set BACKUP_DIR to a folder on a larger disk."
_WRITABLE = "Make the folder writable for this user, or set BACKUP_DIR to another one."
_NO_FOLDER = "A file stands where a folder is needed: move it away, or set BACKUP_DIR to another folder."
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _LARGER),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _WRITABLE),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), _NO_FOLDER),
}
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems say that don't know hard links: FAT, and some that are mounted from elsewhere."""


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
        """Where somebody has copied a file of that name into the folder meanwhile, the next free name is taken."""
        at = taken_at(self.final)
        assert at is not None
        while True:
            try:
                publish(self.partial, self.final)
            except FileExistsError:
                at += timedelta(seconds=1)
                self.final = _place(self.final.parent, at).final
                continue
            self.published = True
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
    for path in (partial, *partial.parent.glob(f"{partial.stem}.copy*")):
        _remove_own(path)


def _place(folder: Path, at: datetime) -> Place:
    name = f"backup_{at.astimezone(UTC).strftime(STAMP)}"
    return Place(folder / f".{name}.partial", folder / f"{name}.backup.gz")


def remove_abandoned(folder: Path, now: datetime) -> None:
    """Remove what a process that was killed left behind: nothing has been written to it for a day."""
    for pattern in (".backup_*.partial", ".backup_*.copy*"):
        for path in folder.glob(pattern):
            _remove_own(path, before=now - ABANDONED_AFTER)


def _remove_own(path: Path, before: datetime | None = None) -> None:
    """Only a file of this user: in a folder that others write to too, anything may have such a name."""
    with suppress(OSError):
        found = path.lstat()
        is_own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
        if is_own and (before is None or found.st_mtime < before.timestamp()):
            path.unlink()


def publish(partial: Path, final: Path) -> None:
    """Give a whole file its name, which then outlives a power cut. Raises FileExistsError where that is taken.

    A link never writes over a file, as a rename does. Where there are no links an empty file takes the name first.
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
    """Make a change of names in this folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # some network file systems don't know it for folders
            raise
    finally:
        os.close(descriptor)
