"""Copies backups from BACKUP_DIR to BACKUP_URL, and back."""

from __future__ import annotations

import os
import stat
from datetime import timedelta
from pathlib import Path

from batch_system import clock
from batch_system.backup.file.digest import is_same
from batch_system.backup.file.folder import taken_at
from batch_system.backup.file.source import Source
from batch_system.backup.places import pins
from batch_system.backup.places.place import FOLDER, LATEST, Places, Storage, backups
from batch_system.backup.places.retention import latest_of
from batch_system.batch.ledger.backups import Facts
from batch_system.concurrency.stoppable import Stop, in_thread
from batch_system.errors import BackupError, UnknownBackup
from batch_system.operations.backups.access import BackupAccess
from batch_system.operations.backups.make import (
    BackupResult,
    check,
    facts_of,
    record_check,
    refuse_changed,
)
from batch_system.operations.backups.progress import OnProgress, ignore_progress


async def upload(
    access: BackupAccess,
    text: str,
    on_progress: OnProgress = ignore_progress,
    *,
    is_checked: bool = False,
) -> BackupResult:
    """Copy a backup and its pin from BACKUP_DIR to BACKUP_URL, and compare the copy with the
    original.

    The backup is compared with its checksums first, unless `is_checked`: the caller has just done
    so. Raises BackupError.
    """
    places = access.places
    elsewhere = await in_thread(lambda _: places.elsewhere())
    if elsewhere is None:
        raise BackupError("BACKUP_URL is empty: set it to s3://bucket/prefix or file:///folder")
    name = await in_thread(lambda _: _local_name(access, text))
    if not is_checked:
        await check(access, str(places.folder.path.absolute() / name), on_progress)

    def copy(stop: Stop) -> Facts:
        with places.folder.open(name) as source:
            facts = facts_of(source, name)
            if pins.is_pinned(places.folder, name):
                pins.put(elsewhere, name, pins.read(places.folder, name))
            if not _is_stored(elsewhere, source, name, stop):
                elsewhere.put(
                    source, name, stop, lambda done: on_progress(done, source.size, "uploading")
                )
            return facts

    facts = await in_thread(copy)
    await record_check(access, facts, elsewhere.place)
    return BackupResult(
        path=str(places.folder.path / name), facts=facts, url=f"{elsewhere.name}/{name}"
    )


def _local_name(access: BackupAccess, text: str) -> str:
    """The name of the backup in BACKUP_DIR that a name, a path or `latest` means. Raises
    BackupError.
    """
    places = access.places
    local = backups(places.folder.listed())
    name = latest_of(local, clock.now()) or text if text == LATEST else Path(text).name
    if name != text != LATEST and access.place_of(text) != FOLDER:
        raise BackupError(f"{text} is not in BACKUP_DIR: move it there first")
    if name not in local:
        raise BackupError(f"there is no backup {name} in {places.folder.name} (BACKUP_DIR)")
    return name


async def local_file(access: BackupAccess, name: str) -> Path:
    """The path of the backup of this name in BACKUP_DIR. Raises UnknownBackup; it follows no
    link.
    """
    path = access.settings.BACKUP_DIR / name
    if path.name != name or taken_at(path) is None or not await in_thread(lambda _: _is_file(path)):
        raise UnknownBackup(
            f"there is no backup {name} in BACKUP_DIR: `batch backup download {name}` copies it "
            "there"
        )
    return path


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _is_stored(storage: Storage, source: Source, name: str, stop: Stop) -> bool:
    """Whether the storage has this backup already.

    Raises BackupError if it has another backup of the same name, which another application may have
    made in the same second.
    """
    if name not in storage.listed():
        return False
    with storage.open(name) as stored:
        if is_same(stored, source, stop):
            return True
    raise BackupError(
        f"{storage.name}/{name} exists and is another backup: give each application a place of its "
        "own (BACKUP_URL)"
    )


async def download(
    access: BackupAccess, text: str, on_progress: OnProgress = ignore_progress
) -> BackupResult:
    """Copy a backup and its pin from BACKUP_URL, or from the URL `text`, into BACKUP_DIR, and
    verify it.

    Raises BackupError.
    """
    places = access.places
    storage, name = await in_thread(lambda _: _remote(places, text))
    source = await in_thread(lambda _: storage.open(name))
    try:
        facts = await in_thread(lambda _: facts_of(source, name))
        if access.place_of(source.name) is not None:
            await refuse_changed(access, source, facts)

        def copy(stop: Stop) -> None:
            if (
                taken_at(Path(name))
                and not places.folder.has(name)
                and pins.is_pinned(storage, name)
            ):
                pins.put(places.folder, name, pins.read(storage, name))
            places.folder.put(
                source, name, stop, lambda done: on_progress(done, source.size, "downloading")
            )

        await in_thread(copy)
    finally:
        source.__exit__(None, None, None)
    path = str(places.folder.path / name)
    if access.place_of(path) is not None:
        await record_check(access, facts, FOLDER)
    return BackupResult(path=path, facts=facts)


def _remote(places: Places, text: str) -> tuple[Storage, str]:
    """The storage and the name of a backup that is given by its URL or by its name at
    BACKUP_URL.
    """
    if "://" in text:
        return places.addressed(text)
    if places.url is None:
        raise BackupError("BACKUP_URL is empty: set it, or give the backup's whole URL")
    return places.addressed(f"{places.url}/{text}")


async def waiting(access: BackupAccess) -> list[str]:
    """The names of verified backups that earlier uploads failed to copy to BACKUP_URL, the newest
    first.

    Only backups younger than BACKUP_RETENTION_DAYS are listed, because retention keeps those in
    both places.
    """
    places = access.places
    elsewhere = await in_thread(lambda _: places.elsewhere())
    if elsewhere is None:
        return []
    local, uploaded = await in_thread(lambda _: (places.folder.listed(), elsewhere.listed()))
    since = clock.now() - timedelta(days=access.settings.BACKUP_RETENTION_DAYS)
    rows = [
        row
        for (place, _), row in (await access.records()).items()
        if place == FOLDER and row["verified_at"]
    ]
    names = [row["name"] for row in rows if row["taken_at"] >= since]
    return [name for name in names if name in local and name not in uploaded]
