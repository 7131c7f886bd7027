"""Where backups are, a folder or a bucket, by the same few verbs; and how one of them is named. Threads call it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from service import clock
from service.backup.digest import PIECE_BYTES
from service.backup.folder import explained, remove_abandoned, taken_at
from service.backup.reader import LocalFile, Source
from service.backup.threads import Stop
from service.backup.verify import verify
from service.config import Settings, get_settings
from service.errors import BackupError, brief

if TYPE_CHECKING:
    from service.backup.objects import Object

LATEST = "latest"


def nothing(_: int) -> None:
    """For who wants to hear nothing."""


class Storage(Protocol):
    """A place of backups. `name`: as people know it, without credentials."""

    name: str

    def listed(self) -> dict[str, int]:
        """The size of each file by its name, others than backups too."""

    def open(self, name: str) -> LocalFile | Object: ...

    def put(self, source: Source, name: str, stop: Stop, tell: Callable[[int], None]) -> None:
        """Copy a backup there. It has its name only when it is whole and was compared."""

    def delete(self, name: str) -> None: ...


class Folder:
    """Backups in a folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)

    def listed(self) -> dict[str, int]:
        """Nothing where the folder is missing."""
        if not self.path.exists():
            return {}
        try:
            with os.scandir(self.path) as entries:
                return dict(_sizes(entries))
        except OSError as error:
            raise BackupError(f"the folder {self.path} can't be read: {error.strerror}") from error

    def open(self, name: str) -> LocalFile:
        return LocalFile(self.path / name, follow=False)

    def put(self, source: Source, name: str, stop: Stop, tell: Callable[[int], None]) -> None:
        final = self.path / name
        partial = self.path / f".{name.split('.')[0]}.{secrets.token_hex(4)}.partial"
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self.path, clock.now())
            if final.exists():
                raise BackupError(f"{final} is there already")
            try:
                _copy(source, partial, stop, tell)
                with LocalFile(partial) as copied:
                    copied.name = source.name  # in messages: the partial file will be gone
                    verify(copied, stop)
                partial.rename(final)
            finally:
                partial.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        try:
            (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise BackupError(
                f"the old backup {self.path / name} can't be deleted: {error.strerror}. Do it by hand."
            ) from error


def _sizes(entries: Iterable[os.DirEntry[str]]) -> Iterator[tuple[str, int]]:
    for entry in entries:
        with suppress(FileNotFoundError):  # another process has just renamed or deleted it
            if entry.is_file(follow_symlinks=False):
                yield entry.name, entry.stat(follow_symlinks=False).st_size


def _copy(source: Source, to: Path, stop: Stop, tell: Callable[[int], None]) -> None:
    with open(os.open(to, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        for offset in range(0, source.size, PIECE_BYTES):
            stop.check()
            file.write(source.read(offset, PIECE_BYTES))
            tell(min(offset + PIECE_BYTES, source.size))
        file.flush()
        os.fsync(file.fileno())


def at(url: str, settings: Settings) -> Storage:
    """The place that a URL names. Raises BackupError."""
    if url.startswith("file://"):
        return Folder(Path(url.removeprefix("file://")))
    if not url.startswith("s3://"):
        raise BackupError(
            f"there are no backups at {url.split('://')[0]}://…; allowed: s3://bucket/prefix, file:///folder"
        )
    try:
        from service.backup.objects import VARIABLES, Objects
    except ModuleNotFoundError as error:
        raise BackupError(f"{url}: for s3:// ({error.name} is missing): pip install 'batch-system[s3]'") from None
    return Objects(url, {name: value for name in VARIABLES if (value := getattr(settings, name, None))})


@dataclass(frozen=True)
class Places:
    """The folder of backups (BACKUP_DIR), and where they are copied to (BACKUP_URL)."""

    folder: Folder
    url: str | None
    settings: Settings

    @classmethod
    def of(cls, settings: Settings) -> Places:
        return cls(Folder(settings.BACKUP_DIR), settings.BACKUP_URL, settings)

    def elsewhere(self) -> Storage | None:
        """None where BACKUP_URL is empty. Raises BackupError."""
        return at(self.url, self.settings) if self.url else None

    def find(self, text: str) -> LocalFile | Object:
        """The backup that a path, a name, `latest` or an address means. Raises BackupError."""
        if "://" in text:
            return self._addressed(text)
        if os.sep in text or (text != LATEST and os.path.isfile(text)):
            return LocalFile(Path(text))
        found = backups(self.folder.listed())
        if text in found or (text == LATEST and found):
            return self.folder.open(text if text in found else max(found))
        if (elsewhere := self.elsewhere()) is not None:
            there = backups(elsewhere.listed())
            if text in there or (text == LATEST and there):
                return elsewhere.open(text if text in there else max(there))
        raise BackupError(self._unknown(text, found))

    def _addressed(self, text: str) -> LocalFile | Object:
        if text.startswith("s3://") and any(mark in text for mark in "@?#"):
            raise BackupError(
                "only a bucket, a prefix and a name may stand in s3://bucket/prefix/name; keys are read from "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        url, _, name = text.rpartition("/")
        storage = at(url, self.settings)
        if name == LATEST:
            there = backups(storage.listed())
            if not there:
                raise BackupError(f"there is no backup in {storage.name}")
            name = max(there)
        return storage.open(name)

    def _unknown(self, text: str, found: dict[str, Any]) -> str:
        where = f"{self.folder.name} (BACKUP_DIR)" + (f" or {self.url} (BACKUP_URL)" if self.url else "")
        if text == LATEST:
            return f"there is no backup in {where}"
        near = f"; the newest there is {max(found)}" if found else ""
        return f"there is no backup {brief(text)} in {where}{near}. Allowed: a path, a name, latest, s3://bucket/prefix/name"


def find(text: str) -> LocalFile | Object:
    """The backup that a path, a name, `latest` or an address means, to be closed by a `with`. Raises BackupError.

    Threads call it. `latest` is the newest of the folder's, and of those at BACKUP_URL where the folder has none.
    """
    return Places.of(get_settings()).find(text)


def backups(listed: dict[str, int]) -> dict[str, int]:
    """Of these files the backups: those whose names are exactly what ours are. By name, so by time."""
    return {name: size for name, size in sorted(listed.items()) if taken_at(Path(name)) is not None}
