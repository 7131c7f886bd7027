"""Places that hold backups, a folder or a bucket, with the same few methods; and the search for a
backup by its name.

All methods block, so they are called in threads.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from batch_system import clock
from batch_system.backup.file.digest import PIECE_BYTES
from batch_system.backup.file.folder import (
    PIN,
    explained,
    publish,
    remove_abandoned,
    sync,
    taken_at,
)
from batch_system.backup.file.reader import LocalFile, Source
from batch_system.backup.file.verify import verify
from batch_system.backup.places.retention import describe_future, is_in_future, latest_of
from batch_system.concurrency.stoppable import Stop
from batch_system.errors import BackupError, UnknownBackup
from batch_system.escaping import brief
from batch_system.logs import get_logger
from batch_system.settings.reading import get_settings
from batch_system.settings.settings import Settings
from batch_system.settings.urls import FILE, folder_of, refuse_one_place

if TYPE_CHECKING:
    from batch_system.backup.places.s3 import Object

logger = get_logger(__name__)

LATEST = "latest"
FOLDER = "folder"
"""The place of BACKUP_DIR in the ledger. The place of BACKUP_URL is its URL."""


def nothing(_: int) -> None:
    """A callback for callers that need no progress."""


class Storage(Protocol):
    """A place that holds backups. `name`: its path or URL without credentials. `place`: its key in
    the ledger.

    The methods raise BackupError if the place can't be read or written.
    """

    name: str
    place: str

    def listed(self) -> dict[str, int]:
        """The size in bytes of each file by its name, including files that are not backups."""

    def has(self, name: str) -> bool: ...

    def open(self, name: str) -> LocalFile | Object: ...

    def read(self, name: str, most: int) -> bytes:
        """The first `most` bytes of a small file; no bytes if it is not a regular file."""

    def write(self, name: str, data: bytes) -> bool:
        """Write a small file. Returns False if there is already a file of that name, which is left
        as it is.
        """

    def changed_at(self, name: str) -> datetime | None:
        """When the file was written, by the clock of the place, in UTC; None if there is no such
        file.
        """

    def put(self, source: Source, name: str, stop: Stop, tell: Callable[[int], None]) -> None:
        """Copy a backup to this place. It gets its name only when it is complete and has been
        verified.

        `tell` is called with the number of bytes copied so far.
        """

    def delete(self, name: str) -> None: ...


class Folder:
    """Backups in a folder of this machine."""

    def __init__(self, path: Path, place: str = FOLDER) -> None:
        self.path = path
        self.name = str(path)
        self.place = place

    def listed(self) -> dict[str, int]:
        """Sizes by name, as in Storage; empty if the folder does not exist."""
        if not self.path.exists():
            return {}
        try:
            with os.scandir(self.path) as entries:
                return dict(_sizes(entries))
        except OSError as error:
            raise BackupError(f"the folder {self.path} can't be read: {error.strerror}") from error

    def has(self, name: str) -> bool:
        return os.path.lexists(self.path / name)

    def open(self, name: str) -> LocalFile:
        return LocalFile(self.path / name, follow=False)

    def read(self, name: str, most: int) -> bytes:
        try:
            descriptor = os.open(self.path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:
                return file.read(most) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
        except OSError:
            return b""

    def write(self, name: str, data: bytes) -> bool:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            sync(self.path)
        except FileExistsError:
            return False
        except OSError as error:
            raise BackupError(
                f"{self.path / name} can't be written: {error.strerror or error}."
            ) from error
        return True

    def changed_at(self, name: str) -> datetime | None:
        with suppress(OSError):
            return datetime.fromtimestamp((self.path / name).lstat().st_mtime, UTC)
        return None

    def put(self, source: Source, name: str, stop: Stop, tell: Callable[[int], None]) -> None:
        final = self.path / name
        partial = self.path / f".{name.split('.')[0]}.{secrets.token_hex(4)}.partial"
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self.path, clock.now())
            if self.has(name):
                raise BackupError(f"{final} exists already")
            try:
                _copy(source, partial, stop, tell)
                with LocalFile(partial) as copy:
                    # Messages name the source, because the partial file is removed.
                    copy.name = source.name
                    verify(copy, stop)
                publish(partial, final)
            except FileExistsError:
                raise BackupError(f"{final} exists already") from None
            finally:
                partial.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        try:
            (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise BackupError(
                f"the old backup {self.path / name} can't be deleted: {error.strerror}. Delete it "
                "by hand."
            ) from error


def _sizes(entries: Iterable[os.DirEntry[str]]) -> Iterator[tuple[str, int]]:
    for entry in entries:
        with suppress(FileNotFoundError):  # another process has just renamed or deleted it
            if entry.is_file(follow_symlinks=False):
                yield entry.name, entry.stat(follow_symlinks=False).st_size
            elif entry.name.endswith(PIN):
                # Anything with this suffix is a pin, even a folder or a link.
                yield entry.name, 0


def _copy(source: Source, to: Path, stop: Stop, tell: Callable[[int], None]) -> None:
    with open(os.open(to, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        for offset in range(0, source.size, PIECE_BYTES):
            stop.check()
            file.write(source.read(offset, PIECE_BYTES))
            tell(min(offset + PIECE_BYTES, source.size))
        file.flush()
        os.fsync(file.fileno())


def at(url: str, settings: Settings) -> Storage:
    """The place with this URL, `s3://bucket/prefix` or `file:///folder`. Raises BackupError."""
    if url.startswith(FILE):
        try:
            return Folder(folder_of(url), place=url)
        except ValueError as error:
            raise BackupError(f"the address {url} is {error}") from None
    if not url.startswith("s3://"):
        raise BackupError(
            f"a backup can't be at {url.split('://')[0]}://…; allowed: s3://bucket/prefix, "
            "file:///folder"
        )
    try:
        from batch_system.backup.places.s3 import VARIABLES, Objects
    except ModuleNotFoundError as error:
        raise BackupError(
            f"{url}: s3:// needs the package {error.name}, which the extra `s3` brings: "
            "pip install 'batch-system[s3]'"
        ) from None
    return Objects(
        url, {name: value for name in VARIABLES if (value := getattr(settings, name, None))}
    )


@dataclass(frozen=True)
class Places:
    """The folder of backups (BACKUP_DIR), and the place that they are copied to (BACKUP_URL)."""

    folder: Folder
    url: str | None
    settings: Settings

    @classmethod
    def of(cls, settings: Settings) -> Places:
        return cls(Folder(settings.BACKUP_DIR), settings.BACKUP_URL, settings)

    def elsewhere(self) -> Storage | None:
        """The place of BACKUP_URL; None if it is not set. Raises BackupError, or InvalidSetting if
        it is BACKUP_DIR.
        """
        if self.url is None:
            return None
        refuse_one_place(self.folder.path, self.url)
        return at(self.url, self.settings)

    def all(self) -> list[Storage]:
        """Both places, the folder first. Raises the errors of `elsewhere`."""
        elsewhere = self.elsewhere()
        return [self.folder, *([elsewhere] if elsewhere else [])]

    def find(self, text: str) -> LocalFile | Object:
        """The backup with this path, name or address, or the newest one for `latest`. Raises
        BackupError.
        """
        if "://" in text:
            storage, name = self.addressed(text)
            return storage.open(name)
        if text == LATEST:
            return self._latest()
        if os.sep in text or os.path.isfile(text):
            return LocalFile(Path(text))
        names = backups(self.folder.listed())
        if text in names:
            return self.folder.open(text)
        if (elsewhere := self.elsewhere()) is not None and text in backups(elsewhere.listed()):
            return elsewhere.open(text)
        near = (
            f"; the newest there is {latest}" if (latest := latest_of(names, clock.now())) else ""
        )
        raise UnknownBackup(
            f"there is no backup {brief(text)} in {self._where()}{near}. Allowed: a path, a name, "
            "latest, s3://bucket/prefix/name"
        )

    def _latest(self) -> LocalFile | Object:
        """The newest backup of both places. Raises BackupError if one can't be listed, because it
        may have the newest.
        """
        try:
            latest = newest(self.all(), clock.now())
        except BackupError as error:
            why = error.message.rstrip(".")
            raise type(error)(
                f"{why}. So which backup is the latest is not known: give its name"
            ) from error
        if latest is None:
            raise UnknownBackup(f"there is no backup in {self._where()}")
        storage, name = latest
        return storage.open(name)

    def addressed(self, text: str) -> tuple[Storage, str]:
        """The place and the name in the address of a backup; `latest` is the name of the newest.
        Raises BackupError.
        """
        if text.startswith("s3://") and any(mark in text for mark in "@?#"):
            raise BackupError(
                "only a bucket, a prefix and a name may stand in s3://bucket/prefix/name; keys "
                "are read from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        url, _, name = text.rpartition("/")
        storage = at(url, self.settings)
        if name != LATEST:
            return storage, name
        if (latest := newest([storage], clock.now())) is None:
            raise UnknownBackup(f"there is no backup in {storage.name}")
        return latest

    def _where(self) -> str:
        return f"{self.folder.name} (BACKUP_DIR)" + (
            f" or {self.url} (BACKUP_URL)" if self.url else ""
        )


def newest(storages: Iterable[Storage], now: datetime) -> tuple[Storage, str] | None:
    """The place and the name of the newest backup; None if there is none except backups with names
    in the future.
    """
    newest_of_each: list[tuple[str, Storage]] = []
    for storage in storages:
        names = backups(storage.listed())
        if name := latest_of(names, now):
            newest_of_each.append((name, storage))
        if future_names := [name for name in names if is_in_future(name, now)]:
            logger.warning(
                f"{describe_future(future_names)} in {storage.name}: not taken for the latest"
            )
    if not newest_of_each:
        return None
    # The first place, if both have that name.
    name, storage = max(newest_of_each, key=lambda pair: pair[0])
    return storage, name


def find(text: str) -> LocalFile | Object:
    """Open the backup with this path, name or address; the caller closes it, by a `with`. Raises
    BackupError.

    `latest` means the newest backup of BACKUP_DIR and BACKUP_URL. The call blocks, so it is made in
    a thread.
    """
    return Places.of(get_settings()).find(text)


def backups(listed: dict[str, int]) -> dict[str, int]:
    """The files whose names are exactly those of backups, with their sizes, in the order of their
    times.
    """
    return {name: size for name, size in sorted(listed.items()) if taken_at(Path(name)) is not None}
