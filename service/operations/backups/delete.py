"""Deletes one backup in each place where it is, because a person asks for it. A pinned one is never
deleted.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from service.backup.file.folder import taken_at
from service.backup.places import pins
from service.backup.places.place import FOLDER, Storage
from service.batch.ledger import backups
from service.concurrency.stoppable import in_thread
from service.errors import BackupError, UnknownBackup
from service.escaping import echoed
from service.operations.asking.results import Result
from service.operations.backups.access import BackupAccess


class DeletedBackup(Result):
    """A backup, and the places in which it is, or was until it was deleted: folder, elsewhere."""

    backup: str
    places: list[str]


async def find(access: BackupAccess, name: str) -> DeletedBackup:
    """Where the backup of this name is. Raises UnknownBackup, and BackupError if it is pinned in
    any place.
    """
    if Path(name).name != name or taken_at(Path(name)) is None:
        raise UnknownBackup(
            f"{echoed(name)} is no name of a backup, such as `batch backup list` shows"
        )
    storages = await in_thread(lambda _: [each for each in access.places.all() if each.has(name)])
    if not storages:
        raise UnknownBackup(f"there is no backup {name} in BACKUP_DIR or at BACKUP_URL")
    pinned = await in_thread(
        lambda _: any(pins.is_pinned(storage, name) for storage in access.places.all())
    )
    if pinned:
        raise BackupError(
            f"{name} is pinned, so it is not deleted: `batch backup unpin {name}` allows that"
        )
    return DeletedBackup(backup=name, places=[_place(storage) for storage in storages])


async def delete(access: BackupAccess, name: str) -> DeletedBackup:
    """Delete the backup in each place, and its records in the ledger. Raises as `find`."""
    found = await find(access, name)
    for storage in await in_thread(
        lambda _: [each for each in access.places.all() if each.has(name)]
    ):
        await in_thread(partial(_delete, storage, name))
        await access.record_if_possible(
            name, partial(backups.remove, name=name, place=storage.place)
        )
    return found


def _delete(storage: Storage, name: str, _: object) -> None:
    if pins.is_pinned(storage, name):
        raise BackupError(f"{name} was pinned meanwhile, and is left in {storage.name}")
    storage.delete(name)


def _place(storage: Storage) -> str:
    return "folder" if storage.place == FOLDER else "elsewhere"
