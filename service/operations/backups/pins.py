"""Pins and unpins backups. A pinned backup is kept until somebody unpins it.

A pin is a file beside the backup in each place, so that a new machine knows it before it deletes anything. Older
versions kept pins in the ledger. The first operation that changes a place moves those to files.
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
    """The name of a backup, and whether the request has `changed` whether it is pinned."""

    backup: str
    changed: bool


async def pin(access: BackupAccess, text: str, by: str) -> PinChange:
    """Keep a backup until it is unpinned. `by`: the name of the person who asks. Raises BackupError."""
    name = await in_thread(lambda _: _name_of(access, text))
    new_pin = Pin(by, clock.now())

    def put(storage: Storage) -> bool:
        if not storage.has(name):
            return False
        is_new = pins.put(storage, name, new_pin)
        if not storage.has(name):  # a prune may have looked for the pin just before
            raise BackupError(f"{storage.name}/{name} was deleted meanwhile.")
        return is_new

    is_new = await in_thread(lambda _: _in_each_place(access, name, "pinned", put))
    return PinChange(backup=name, changed=is_new)


async def unpin(access: BackupAccess, text: str) -> PinChange:
    """Allow pruning to delete a backup again. Raises BackupError.

    A backup that is damaged or deleted can be unpinned too, by its name without a folder.
    """
    is_name = Path(text).name == text and taken_at(Path(text)) is not None
    name = text if is_name else await in_thread(lambda _: _name_of(access, text))
    was_in_ledger = await access.in_ledger(partial(backups.unpin, name=name))
    remove = partial(pins.remove, name=name)
    was_pinned = await in_thread(lambda _: _in_each_place(access, name, "unpinned", remove))
    return PinChange(backup=name, changed=was_pinned or bool(was_in_ledger))


def _name_of(access: BackupAccess, text: str) -> str:
    """The name of the backup that `text` gives. Raises BackupError, also if it is in neither of the two places."""
    with access.places.find(text) as source:
        name = facts_of(source, Path(source.name).name).name
    if access.place_of(source.name) is None:
        raise BackupError(
            f"{source.name} is neither in BACKUP_DIR nor at BACKUP_URL: only backups there are ever pruned"
        )
    return name


def _in_each_place(access: BackupAccess, name: str, done: str, change: Callable[[Storage], bool]) -> bool:
    """Make a change in each place that can be reached. Returns whether any place was changed.

    Raises BackupError if a place can't be reached; `done` is the participle for its message.
    """
    changes, errors = [], []
    for storage in access.places.all():
        try:
            changes.append(change(storage))
        except BackupError as error:
            errors.append(error.message.rstrip("."))
    if errors:
        outcome = f"{name} is {done} in one place only" if changes else f"{name} is not {done}"
        raise BackupError(f"{outcome}: {'; '.join(errors)}. Then do it again")
    return any(changes)


async def move_pins(access: BackupAccess, storages: Sequence[Storage], listings: Sequence[Listing]) -> list[Listing]:
    """Move pins that are still in the ledger to files beside the backups. Returns the listings with these pins.

    Pins of backups in other places remain in the ledger. Existing pins are unchanged. Raises BackupError and
    DatabaseError.
    """
    old_pins = await access.in_ledger(backups.rows_with_pins) or ()
    moved = []
    for storage, listing in zip(storages, listings, strict=True):
        rows = [row for row in old_pins if row["name"] in listing.sizes]
        for row in rows:
            name = row["name"]
            if name not in listing.pinned:
                await in_thread(partial(_put, storage, name, Pin(row["pinned_by"], row["pinned_at"])))
            await access.in_ledger(partial(backups.clear_pin, name=name, place=listing.place))
        moved.append(replace(listing, pinned=listing.pinned | {row["name"] for row in rows}))
    return moved


def _put(storage: Storage, name: str, pin: Pin, _: Stop) -> None:
    pins.put(storage, name, pin)
