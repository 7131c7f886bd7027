"""Deletes backups in BACKUP_DIR and at BACKUP_URL: old ones by one set of rules, or one that a
person names. A pinned one is never deleted.

Backups are deleted one by one, and each deletion is recorded in the ledger after it, so a kill does
no harm.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from batch_system import clock
from batch_system.backup.file.folder import taken_at
from batch_system.backup.places import pins
from batch_system.backup.places.pins import Listing
from batch_system.backup.places.place import FOLDER, Storage
from batch_system.backup.places.retention import Decision, describe_future
from batch_system.batch.ledger import backups
from batch_system.concurrency.stoppable import Stop, in_thread
from batch_system.errors import BackupError, UnknownBackup
from batch_system.escaping import echoed
from batch_system.operations.asking.results import Result
from batch_system.operations.backups.access import BackupAccess
from batch_system.operations.backups.catalogue import decide_all, record_unknown


@dataclass(frozen=True)
class PrunePlan:
    """Which backups of one place are kept, and which are deleted."""

    storage: Storage
    listing: Listing
    decision: Decision


async def prune_plans(access: BackupAccess) -> list[PrunePlan]:
    """Plan what to delete in BACKUP_DIR, and at BACKUP_URL if it is set. Raises BackupError and
    DatabaseError.

    Before that, all backups in these places are recorded in the ledger, if there is one.
    """
    storages = await in_thread(lambda _: access.places.all())
    listings = await in_thread(lambda _: [pins.look(storage) for storage in storages])
    rows = await record_unknown(access, storages, listings)
    decisions = decide_all(access, listings, rows)
    return [PrunePlan(*parts) for parts in zip(storages, listings, decisions, strict=True)]


def warnings(plans: list[PrunePlan], *, allow_many: bool = False) -> list[str]:
    """Sentences about what a person should check: why nothing is deleted, and which names are in
    the future.
    """
    texts = []
    for plan in plans:
        if plan.decision.doubt:
            texts.append(f"No old backup is deleted in {plan.storage.name}: {plan.decision.doubt}")
        if plan.decision.too_many and not allow_many:
            texts.append(
                f"No old backup is deleted in {plan.storage.name}: {plan.decision.too_many}, more "
                "than half. Look at `batch backup prune --dry-run` and the settings BACKUP_…; "
                "`batch backup prune --yes` deletes them"
            )
        if plan.decision.in_future:
            future = describe_future(plan.decision.in_future)
            texts.append(f"{future} in {plan.storage.name}: not taken for the newest")
    return texts


async def delete_old(
    access: BackupAccess, plans: list[PrunePlan], *, allow_many: bool = False
) -> AsyncIterator[str]:
    """Delete the backups that the plans don't keep, and yield the path or URL of each after that.

    A backup that is pinned meanwhile is kept. If a plan deletes more than half of a place, nothing
    is deleted there, unless `allow_many`. Raises BackupError and DatabaseError.
    """
    for plan in plans:
        storage = plan.storage
        for name in () if plan.decision.too_many and not allow_many else plan.decision.going:
            if await in_thread(partial(_delete, storage, name)):
                await access.in_ledger(partial(backups.remove, name=name, place=storage.place))
                yield f"{storage.name}/{name}"
        await in_thread(partial(_remove_orphaned_pins, plan))


class PrunedBackup(Result):
    """The outcome for one backup: `then` is stays, deleted or would go; `where` is folder or
    elsewhere.
    """

    backup: str
    where: str
    then: str
    why: str


async def prune(
    access: BackupAccess,
    warn: Callable[[str], None],
    on_delete: Callable[[str], None],
    *,
    dry_run: bool,
    allow_many: bool,
) -> list[PrunedBackup]:
    """Delete old backups, and return the outcome for each backup; `dry_run`: delete nothing.

    `on_delete` is called with the path or URL of each deleted backup. Raises BackupError and
    DatabaseError.
    """
    plans = await prune_plans(access)
    for warning in warnings(plans, allow_many=allow_many):
        warn(warning)
    deleted = set()
    async for path in delete_old(access, [] if dry_run else plans, allow_many=allow_many):
        on_delete(path)
        deleted.add(path)
    return [pruned for plan in plans for pruned in _outcomes(plan, deleted, dry_run, allow_many)]


def _outcomes(
    plan: PrunePlan, deleted: set[str], dry_run: bool, allow_many: bool
) -> Iterator[PrunedBackup]:
    where = "folder" if plan.storage.place == FOLDER else "elsewhere"
    is_held = plan.decision.too_many and not allow_many
    for verdict in plan.decision.verdicts:
        goes = (
            not verdict.stays
            and not is_held
            and (dry_run or f"{plan.storage.name}/{verdict.name}" in deleted)
        )
        then = ("would go" if dry_run else "deleted") if goes else "stays"
        is_kept = not goes and not verdict.stays
        why = (
            ("more than half would go" if is_held else "pinned meanwhile")
            if is_kept
            else verdict.why
        )
        yield PrunedBackup(backup=verdict.name, where=where, then=then, why=why)


def _delete(storage: Storage, name: str, _: Stop) -> bool:
    """Delete a backup unless it is pinned. Returns whether it was deleted."""
    if pins.is_pinned(storage, name):
        return False
    storage.delete(name)
    return True


def _remove_orphaned_pins(plan: PrunePlan, _: Stop) -> None:
    pins.remove_orphans(plan.storage, plan.listing.orphans, clock.now())


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
        await in_thread(partial(_delete_unpinned, storage, name))
        await access.record_if_possible(
            name, partial(backups.remove, name=name, place=storage.place)
        )
    return found


def _delete_unpinned(storage: Storage, name: str, _: object) -> None:
    if pins.is_pinned(storage, name):
        raise BackupError(f"{name} was pinned meanwhile, and is left in {storage.name}")
    storage.delete(name)


def _place(storage: Storage) -> str:
    return "folder" if storage.place == FOLDER else "elsewhere"
