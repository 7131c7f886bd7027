"""Pins and unpins backups. A pinned backup is kept until somebody unpins it.

A pin is a file beside the backup in each place, so that a new machine knows it before it deletes
anything.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from batch_system import clock
from batch_system.backup.file.folder import taken_at
from batch_system.backup.places import pins
from batch_system.backup.places.pins import Pin
from batch_system.backup.places.place import Storage
from batch_system.concurrency.stoppable import in_thread
from batch_system.errors import BackupError
from batch_system.operations.asking.results import Result
from batch_system.operations.backups.access import BackupAccess
from batch_system.operations.backups.make import facts_of


class PinChange(Result):
    """The name of a backup, and whether the request has `changed` whether it is pinned."""

    backup: str
    changed: bool


async def pin(access: BackupAccess, text: str, by: str) -> PinChange:
    """Keep a backup until it is unpinned. `by`: the name of the person who asks. Raises
    BackupError.
    """
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
    remove = partial(pins.remove, name=name)
    was_pinned = await in_thread(lambda _: _in_each_place(access, name, "unpinned", remove))
    return PinChange(backup=name, changed=was_pinned)


def _name_of(access: BackupAccess, text: str) -> str:
    """The name of the backup that `text` gives. Raises BackupError, also if it is in neither of the
    two places.
    """
    with access.places.find(text) as source:
        name = facts_of(source, Path(source.name).name).name
    if access.place_of(source.name) is None:
        raise BackupError(
            f"{source.name} is neither in BACKUP_DIR nor at BACKUP_URL: only backups there are "
            "ever pruned"
        )
    return name


def _in_each_place(
    access: BackupAccess, name: str, done: str, change: Callable[[Storage], bool]
) -> bool:
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
