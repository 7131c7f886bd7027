"""Deleting old backups, in the folder and elsewhere, by one set of rules.

Each is deleted by itself, and the ledger hears of it afterwards: a kill in the midst leaves nothing half.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial

from service import clock
from service.backup.places import pins
from service.backup.places.pins import Listing
from service.backup.places.place import Places, Storage
from service.backup.places.retention import Decision, describe_future
from service.batch.ledger import backups
from service.concurrency.stoppable import Stop, in_thread
from service.config import Settings
from service.operations.backups.catalogue import adopted, decided
from service.operations.backups.make import recorded
from service.operations.backups.pins import written_out


@dataclass(frozen=True)
class Plan:
    """What is to become of the backups in one place."""

    storage: Storage
    seen: Listing
    decision: Decision


async def plans(settings: Settings) -> list[Plan]:
    """A plan for BACKUP_DIR, and one for BACKUP_URL. Raises BackupError, and DatabaseError where the ledger is away.

    By then each backup in these places is known to the ledger, if there is one, and each pin stands beside its file.
    """
    storages = await in_thread(lambda _: Places.of(settings).all())
    seen = await in_thread(lambda _: [pins.look(storage) for storage in storages])
    seen = await written_out(settings, storages, seen)
    rows = await adopted(settings, storages, seen)
    decisions = decided(seen, rows, settings)
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


async def prune(settings: Settings, planned: list[Plan], *, is_meant: bool = False) -> AsyncIterator[str]:
    """Delete what the plans let go, and yield where each was that is gone. What is pinned meanwhile stays.

    Where more than half would go at once nothing does, unless a person says that it is meant.
    """
    for plan in planned:
        storage = plan.storage
        for name in () if plan.decision.too_many and not is_meant else plan.decision.going:
            if await in_thread(partial(_deleted, storage, name)):
                await recorded(settings, partial(backups.gone, name=name, place=storage.place))
                yield f"{storage.name}/{name}"
        await in_thread(partial(_swept, plan))


def _deleted(storage: Storage, name: str, _: Stop) -> bool:
    if pins.is_pinned(storage, name):
        return False
    storage.delete(name)
    return True


def _swept(plan: Plan, _: Stop) -> None:
    pins.remove_orphans(plan.storage, plan.seen.orphans, clock.now())
