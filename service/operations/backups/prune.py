"""Deleting old backups, in the folder and elsewhere, by one set of rules.

Each is deleted by itself, and the ledger hears of it afterwards: a kill in the midst leaves nothing half.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial

from service import clock
from service.backup.places import pins
from service.backup.places.pins import Listing
from service.backup.places.place import FOLDER, Storage
from service.backup.places.retention import Decision, describe_future
from service.batch.ledger import backups
from service.concurrency.stoppable import Stop, in_thread
from service.operations.backups.access import BackupAccess
from service.operations.backups.catalogue import adopted, decided
from service.operations.backups.pins import written_out
from service.operations.results import Result


@dataclass(frozen=True)
class Plan:
    """What is to become of the backups in one place."""

    storage: Storage
    seen: Listing
    decision: Decision


async def plans(access: BackupAccess) -> list[Plan]:
    """A plan for BACKUP_DIR, and one for BACKUP_URL. Raises BackupError, and DatabaseError where the ledger is away.

    By then each backup in these places is known to the ledger, if there is one, and each pin stands beside its file.
    """
    storages = await in_thread(lambda _: access.places.all())
    seen = await in_thread(lambda _: [pins.look(storage) for storage in storages])
    seen = await written_out(access, storages, seen)
    rows = await adopted(access, storages, seen)
    decisions = decided(seen, rows, access)
    return [Plan(*of_a_place) for of_a_place in zip(storages, seen, decisions, strict=True)]


def warnings(planned: list[Plan], *, is_meant: bool = False) -> list[str]:
    """What a person should look at: why nothing is deleted, and which names a wrong clock has given."""
    found = []
    for plan in planned:
        if plan.decision.doubt:
            found.append(f"No old backup is deleted in {plan.storage.name}: {plan.decision.doubt}")
        if plan.decision.too_many and not is_meant:
            found.append(
                f"No old backup is deleted in {plan.storage.name}: {plan.decision.too_many}, more than half. Look at "
                "`batch backup prune --dry-run` and the settings BACKUP_…; `batch backup prune --yes` deletes them"
            )
        if plan.decision.in_future:
            found.append(f"{describe_future(plan.decision.in_future)} in {plan.storage.name}: not taken for the newest")
    return found


async def delete_old(access: BackupAccess, planned: list[Plan], *, is_meant: bool = False) -> AsyncIterator[str]:
    """Delete what the plans let go, and yield where each was that is gone. What is pinned meanwhile stays.

    Where more than half would go at once nothing does, unless a person says that it is meant.
    """
    for plan in planned:
        storage = plan.storage
        for name in () if plan.decision.too_many and not is_meant else plan.decision.going:
            if await in_thread(partial(_deleted, storage, name)):
                await access.recorded(partial(backups.gone, name=name, place=storage.place))
                yield f"{storage.name}/{name}"
        await in_thread(partial(_swept, plan))


class PrunedBackup(Result):
    """What became of one backup: `then` is stays, deleted or would go; `where` is folder or elsewhere."""

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
    is_meant: bool,
) -> list[PrunedBackup]:
    """Plan, delete unless it is a dry run, and say what became of each backup. Raises BackupError, DatabaseError."""
    planned = await plans(access)
    for warning in warnings(planned, is_meant=is_meant):
        warn(warning)
    gone = set()
    async for where in delete_old(access, [] if dry_run else planned, is_meant=is_meant):
        on_delete(where)
        gone.add(where)
    return [pruned for plan in planned for pruned in _outcomes(plan, gone, dry_run, is_meant)]


def _outcomes(plan: Plan, gone: set[str], dry_run: bool, is_meant: bool) -> Iterator[PrunedBackup]:
    where = "folder" if plan.storage.place == FOLDER else "elsewhere"
    is_held = plan.decision.too_many and not is_meant
    for verdict in plan.decision.verdicts:
        goes = not verdict.stays and not is_held and (dry_run or f"{plan.storage.name}/{verdict.name}" in gone)
        then = ("would go" if dry_run else "deleted") if goes else "stays"
        is_kept = not goes and not verdict.stays
        why = ("more than half would go" if is_held else "pinned meanwhile") if is_kept else verdict.why
        yield PrunedBackup(backup=verdict.name, where=where, then=then, why=why)


def _deleted(storage: Storage, name: str, _: Stop) -> bool:
    if pins.is_pinned(storage, name):
        return False
    storage.delete(name)
    return True


def _swept(plan: Plan, _: Stop) -> None:
    pins.remove_orphans(plan.storage, plan.seen.orphans, clock.now())
