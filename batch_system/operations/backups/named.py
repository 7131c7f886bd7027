"""`operations.named_backups`: the backups of both places for callers over HTTP, by name, without
paths or URLs.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from batch_system.backup.comparing.differences import Difference
from batch_system.backup.file.folder import taken_at
from batch_system.backup.file.reader import SavedTable
from batch_system.backup.places.place import FOLDER, LATEST, Places, backups
from batch_system.concurrency.stoppable import in_thread
from batch_system.errors import BackupError, UnknownBackup
from batch_system.escaping import echoed
from batch_system.logs import get_logger
from batch_system.operations.asking.context import Context
from batch_system.operations.backups.access import BackupAccess
from batch_system.operations.backups.backups import Backups, Warn
from batch_system.operations.backups.details import BackupDetails
from batch_system.operations.backups.make import BackupResult
from batch_system.operations.backups.pins import PinChange
from batch_system.operations.backups.results import BackupSummary
from batch_system.settings.urls import FILE, folder_of

ELSEWHERE = "elsewhere"
_PATH = re.compile(r"(?:\w+://|\.{0,2}/)[^\s'\",;()]*[^\s'\",;().:]")

logger = get_logger(__name__)


class NamedBackups:
    """What callers over HTTP may do. Each method raises the errors of Backups, whose messages name
    no folder and no URL.

    A name must be in the list, or be `latest`: no other file is read.
    """

    def __init__(self, context: Context) -> None:
        self._backups = Backups(context)
        self._access = BackupAccess(context.settings, context.databases)

    async def list(self, warn: Warn) -> Sequence[BackupSummary]:
        """The backups in both places, the newest first. `place` and `where` are `folder` or
        `elsewhere`.
        """
        async with self._telling_no_place():
            return [self._without_place(each) for each in await self._backups.list(warn)]

    async def show(self, name: str, warn: Warn) -> tuple[BackupDetails, Sequence[SavedTable]]:
        """What the manifest of a backup and the ledger say about it, and its tables."""
        async with self._telling_no_place():
            details, tables = await self._backups.show(await self._address(name), warn)
        wrong = self._plain(details.wrong) if details.wrong is not None else None
        return details.model_copy(update={"backup": _name(details.backup), "wrong": wrong}), tables

    async def verify(self, name: str) -> BackupResult:
        """Compare every byte of a backup with its checksums, and record the outcome."""
        async with self._telling_no_place():
            return await self._backups.verify(await self._address(name))

    async def diff(self, before: str, after: str | None = None) -> Difference:
        """Compare a backup with a later one, or with the database as it is now. Nothing is
        changed.
        """
        async with self._telling_no_place():
            addresses = (
                await self._address(before),
                await self._address(after) if after is not None else None,
            )
            found = await self._backups.diff(*addresses)
        sides = (
            replace(found.before, name=_name(found.before.name)),
            replace(found.after, name=_name(found.after.name)),
        )
        return replace(found, before=sides[0], after=sides[1])

    async def pin(self, name: str) -> PinChange:
        """Keep a backup until it is unpinned."""
        async with self._telling_no_place():
            return await self._backups.pin(await self._address(name))

    async def unpin(self, name: str) -> PinChange:
        """Allow pruning to delete a backup again, also one that is damaged or deleted."""
        async with self._telling_no_place():
            is_name = taken_at(Path(name)) is not None
            return await self._backups.unpin(name if is_name else await self._address(name))

    async def to_download(self, name: str) -> Path:
        """The file of the backup of this name in BACKUP_DIR. Raises UnknownBackup if it is not
        there.
        """
        async with self._telling_no_place():
            return await self._backups.to_download(name)

    async def _address(self, name: str) -> str:
        """The path or URL of the backup of this name. Raises UnknownBackup if neither place has
        it.
        """
        return (
            name
            if name == LATEST
            else await in_thread(lambda _: _address_in(self._access.places, name))
        )

    @asynccontextmanager
    async def _telling_no_place(self) -> AsyncIterator[None]:
        try:
            yield
        except BackupError as error:
            if (plain := self._plain(error.message)) == error.message:
                raise
            logger.warning(error.message)
            raise type(error)(plain) from error

    def _without_place(self, summary: BackupSummary) -> BackupSummary:
        place = FOLDER if summary.place == FOLDER else ELSEWHERE
        wrong = self._plain(summary.failed_check) if summary.failed_check is not None else None
        return summary.model_copy(update={"place": place, "where": place, "failed_check": wrong})

    def _plain(self, message: str) -> str:
        """The message, with each path and URL shortened to its last part."""
        folder, url = self._access.settings.BACKUP_DIR, self._access.settings.BACKUP_URL
        places = {
            str(folder): "BACKUP_DIR",
            str(folder.absolute()): "BACKUP_DIR",
            str(folder.resolve()): "BACKUP_DIR",
        }
        if url:
            places[url] = places[str(folder_of(url)) if url.startswith(FILE) else url] = (
                "BACKUP_URL"
            )
        for place in sorted(places, key=len, reverse=True):
            message = message.replace(f"{place}/", "")
            if "/" in place:  # otherwise it may be a word of the message
                message = message.replace(place, places[place])
        return _PATH.sub(lambda found: _name(found[0]), message)


def _address_in(places: Places, name: str) -> str:
    if taken_at(Path(name)) is not None and Path(name).name == name:
        if name in backups(places.folder.listed()):
            return f"{places.folder.path.absolute()}/{name}"
        if (elsewhere := places.elsewhere()) is not None and name in backups(elsewhere.listed()):
            return f"{elsewhere.name}/{name}"
    raise UnknownBackup(f"there is no backup {echoed(name)}: the list of backups has their names")


def _name(address: str) -> str:
    """The name of a backup or a database without its folder or address."""
    return PurePosixPath(address).name
