"""Pins: which backups are kept until somebody unpins them. They stand beside the files, in each place.

So they are there on a new machine too, before anything is deleted. Older versions had them in the ledger: what is still
there is written beside the files by whoever first looks at a place in order to change something.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from service import clock
from service.backup.file.folder import taken_at
from service.backup.places import pins
from service.backup.places.pins import Listing, Pin
from service.backup.places.place import Storage
from service.batch.ledger import backups
from service.concurrency.stoppable import Stop, in_thread
from service.errors import BackupError
from service.operations.backups.access import BackupAccess
from service.operations.backups.make import facts_of
from service.operations.results import Result


class PinChange(Result):
    """A backup by its name, and whether the request `changed` something: it was not pinned yet, or it was pinned."""

    backup: str
    changed: bool


async def pin(access: BackupAccess, text: str, by: str) -> PinChange:
    """Keep a backup for ever. Raises BackupError."""
    name = await in_thread(lambda _: _named(access, text))
    made = Pin(by, clock.now())

    def put(storage: Storage) -> bool:
        if not storage.has(name):
            return False
        is_new = pins.put(storage, name, made)
        if not storage.has(name):  # a prune may have looked for the pin just before
            raise BackupError(f"{storage.name}/{name} was deleted meanwhile.")
        return is_new

    is_new = await in_thread(lambda _: _everywhere(access, name, "pinned", put))
    return PinChange(backup=name, changed=is_new)


async def unpin(access: BackupAccess, text: str) -> PinChange:
    """Let a backup be pruned again. Raises BackupError.

    By its bare name also one that is damaged, or gone.
    """
    is_name = Path(text).name == text and taken_at(Path(text)) is not None
    name = text if is_name else await in_thread(lambda _: _named(access, text))
    was_in_ledger = await access.recorded(partial(backups.unpin, name=name))
    was = await in_thread(lambda _: _everywhere(access, name, "unpinned", lambda place: pins.remove(place, name)))
    return PinChange(backup=name, changed=was or bool(was_in_ledger))


def _named(access: BackupAccess, text: str) -> str:
    with access.places.find(text) as source:
        name = facts_of(source, Path(source.name).name).name
    if access.place_of(source.name) is None:
        raise BackupError(
            f"{source.name} is neither in BACKUP_DIR nor at BACKUP_URL, where nothing else is ever pruned"
        )
    return name


def _everywhere(access: BackupAccess, name: str, done: str, work: Callable[[Storage], bool]) -> bool:
    """In each place that can be reached. Raises BackupError, which says where it is done and where not."""
    did, wrong = [], []
    for storage in access.places.all():
        try:
            did.append(work(storage))
        except BackupError as error:
            wrong.append(error.message.rstrip("."))
    if wrong:
        where = f"{name} is {done} in one place only" if did else f"{name} is not {done}"
        raise BackupError(f"{where}: {'; '.join(wrong)}. Then do it again")
    return any(did)


async def written_out(access: BackupAccess, storages: Sequence[Storage], seen: Sequence[Listing]) -> list[Listing]:
    """What is seen once the pins of the ledger stand beside their files. Those of other places wait in the ledger.

    It may be done again at any moment: a pin that is there stays as it is. Raises BackupError and DatabaseError.
    """
    waiting = await access.recorded(backups.pins) or ()
    found = []
    for storage, one in zip(storages, seen, strict=True):
        those = {row["name"]: Pin(row["pinned_by"], row["pinned_at"]) for row in waiting if row["name"] in one.sizes}
        for name, pin in those.items():
            if name not in one.pinned:
                await in_thread(partial(_put, storage, name, pin))
            await access.recorded(partial(backups.pin_written, name=name, place=one.place))
        found.append(replace(one, pinned=one.pinned | those.keys()))
    return found


def _put(storage: Storage, name: str, pin: Pin, _: Stop) -> None:
    pins.put(storage, name, pin)
