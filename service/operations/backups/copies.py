"""Backups on their way: from BACKUP_DIR to BACKUP_URL, and back."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from service import clock
from service.backup.file.digest import is_same
from service.backup.file.folder import taken_at
from service.backup.file.source import Source
from service.backup.places import pins
from service.backup.places.place import FOLDER, LATEST, Places, Storage, backups
from service.backup.places.retention import latest_of
from service.batch.ledger.backups import Facts
from service.concurrency.stoppable import Stop, in_thread
from service.errors import BackupError
from service.operations.backups.access import BackupAccess
from service.operations.backups.make import (
    BackupResult,
    Tell,
    check,
    facts_of,
    nobody,
    record_check,
    refuse_changed,
)


async def upload(access: BackupAccess, text: str, tell: Tell = nobody, *, is_checked: bool = False) -> BackupResult:
    """Copy a backup of BACKUP_DIR to BACKUP_URL, which compares what arrived, with its pin. Raises BackupError.

    It is read and compared with its checksums before, so that the copy is as good; unless that was done just now.
    """
    places = access.places
    elsewhere = await in_thread(lambda _: places.elsewhere())
    if elsewhere is None:
        raise BackupError("BACKUP_URL is empty: set it to s3://bucket/prefix or file:///folder")
    name = await in_thread(lambda _: _near(access, text))
    if not is_checked:
        await check(access, str(places.folder.path.absolute() / name), tell)

    def work(stop: Stop) -> Facts:
        with places.folder.open(name) as source:
            facts = facts_of(source, name)
            if pins.is_pinned(places.folder, name):
                pins.put(elsewhere, name, pins.read(places.folder, name))
            if not _is_there(elsewhere, source, name, stop):
                elsewhere.put(source, name, stop, lambda done: tell(done, source.size, "uploading"))
            return facts

    facts = await in_thread(work)
    await record_check(access, facts, elsewhere.place)
    return BackupResult(path=str(places.folder.path / name), facts=facts, url=f"{elsewhere.name}/{name}")


def _near(access: BackupAccess, text: str) -> str:
    """The name of the backup in BACKUP_DIR that a name, a path or `latest` means."""
    places = access.places
    here = backups(places.folder.listed())
    name = latest_of(here, clock.now()) or text if text == LATEST else Path(text).name
    if name != text != LATEST and access.place_of(text) != FOLDER:
        raise BackupError(f"{text} is not in BACKUP_DIR: move it there first")
    if name not in here:
        raise BackupError(f"there is no backup {name} in {places.folder.name} (BACKUP_DIR)")
    return name


def _is_there(storage: Storage, source: Source, name: str, stop: Stop) -> bool:
    """Two applications may make backups at the same second: one must not write over the other's."""
    if name not in storage.listed():
        return False
    with storage.open(name) as stored:
        if is_same(stored, source, stop):
            return True
    raise BackupError(
        f"{storage.name}/{name} is another backup already: give each application a place of its own (BACKUP_URL)"
    )


async def download(access: BackupAccess, text: str, tell: Tell = nobody) -> BackupResult:
    """Copy a backup from BACKUP_URL, or from its own address, into BACKUP_DIR, with its pin. It has its name once it is
    verified. Raises BackupError."""
    places = access.places
    storage, name = await in_thread(lambda _: _far(places, text))
    source = await in_thread(lambda _: storage.open(name))
    try:
        facts = await in_thread(lambda _: facts_of(source, name))
        if access.place_of(source.name) is not None:
            await refuse_changed(access, source, facts)

        def work(stop: Stop) -> None:
            if taken_at(Path(name)) and not places.folder.has(name) and pins.is_pinned(storage, name):
                pins.put(places.folder, name, pins.read(storage, name))
            places.folder.put(source, name, stop, lambda done: tell(done, source.size, "downloading"))

        await in_thread(work)
    finally:
        source.__exit__(None, None, None)
    path = str(places.folder.path / name)
    if access.place_of(path) is not None:
        await record_check(access, facts, FOLDER)
    return BackupResult(path=path, facts=facts)


def _far(places: Places, text: str) -> tuple[Storage, str]:
    if "://" in text:
        return places.addressed(text)
    if places.url is None:
        raise BackupError("BACKUP_URL is empty: set it, or give the backup's whole address")
    return places.addressed(f"{places.url}/{text}")


async def waiting(access: BackupAccess) -> list[str]:
    """Verified backups that should be at BACKUP_URL and are not, the newest first: what earlier tries left undone.

    Only young ones, which retention keeps in both places.
    """
    places = access.places
    elsewhere = await in_thread(lambda _: places.elsewhere())
    if elsewhere is None:
        return []
    here, there = await in_thread(lambda _: (places.folder.listed(), elsewhere.listed()))
    young = clock.now() - timedelta(days=access.settings.BACKUP_RETENTION_DAYS)
    rows = [row for (place, _), row in (await access.known()).items() if place == FOLDER and row["verified_at"]]
    names = [row["name"] for row in rows if row["taken_at"] >= young]
    return [name for name in names if name in here and name not in there]
