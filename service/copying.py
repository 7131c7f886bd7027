"""Backups on their way: from BACKUP_DIR to BACKUP_URL, and back."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock
from service.backup.digest import is_same
from service.backup.source import Source
from service.backup.storage import Places, Storage, backups
from service.backup.threads import Stop, in_thread
from service.batch import records
from service.batch.records import CHECKSUMS, Facts
from service.config import Settings
from service.errors import BackupError
from service.keeping import Done, Tell, facts_of, known, nobody, noted, own_name


async def upload(settings: Settings, text: str, tell: Tell = nobody) -> Done:
    """Copy a backup of BACKUP_DIR to BACKUP_URL, which compares what arrived. Raises BackupError."""
    places = Places.of(settings)
    elsewhere = await in_thread(lambda _: places.elsewhere())
    if elsewhere is None:
        raise BackupError("BACKUP_URL is empty: set it to s3://bucket/prefix or file:///folder")
    here = backups(await in_thread(lambda _: places.folder.listed()))
    name = max(here, default=text) if text == "latest" else Path(text).name
    if name not in here:
        raise BackupError(f"there is no backup {name} in {places.folder.name} (BACKUP_DIR)")

    def work(stop: Stop) -> Facts:
        with places.folder.open(name) as source:
            facts = facts_of(source, name)
            if not _is_there(elsewhere, source, name, stop):
                elsewhere.put(source, name, stop, lambda done: tell(done, source.size, "uploading"))
            return facts

    facts = await in_thread(work)
    url = f"{elsewhere.name}/{name}"

    async def write(connection: AsyncConnection) -> None:
        await records.record(connection, facts, clock.now())
        await records.uploaded(connection, name, url, clock.now())

    await noted(settings, name, write)
    return Done(str(places.folder.path / name), facts, url)


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


async def download(settings: Settings, text: str, tell: Tell = nobody) -> Done:
    """Copy a backup from BACKUP_URL, or from its own address, into BACKUP_DIR. It has its name once it is verified."""
    places = Places.of(settings)

    def work(stop: Stop) -> Facts:
        with _far(places, text) as source:
            name = source.name.rsplit("/", 1)[-1]
            facts = facts_of(source, name)
            places.folder.put(source, name, stop, lambda done: tell(done, source.size, "downloading"))
            return facts

    facts = await in_thread(work)

    async def write(connection: AsyncConnection) -> None:
        await records.record(connection, facts, clock.now())
        await records.verified(connection, facts.name, CHECKSUMS, clock.now())

    path = str(places.folder.path / facts.name)
    if own_name(settings, path):
        await noted(settings, facts.name, write)
    return Done(path, facts)


def _far(places: Places, text: str) -> Any:
    if "://" in text:
        return places.find(text)
    if places.url is None:
        raise BackupError("BACKUP_URL is empty: set it, or give the backup's whole address")
    return places.find(f"{places.url}/{text}")


async def waiting(settings: Settings) -> list[str]:
    """Verified backups that should be at BACKUP_URL and are not, the newest first: what earlier tries left undone.

    Only young ones, which retention keeps in both places.
    """
    places = Places.of(settings)
    elsewhere = await in_thread(lambda _: places.elsewhere())
    if elsewhere is None:
        return []
    here, there = await in_thread(lambda _: (places.folder.listed(), elsewhere.listed()))
    young = clock.now() - timedelta(days=settings.BACKUP_RETENTION_DAYS)
    rows = [row for row in (await known(settings)).values() if row["verified_at"] and row["taken_at"] >= young]
    return [row["name"] for row in rows if row["name"] in here and row["name"] not in there]
