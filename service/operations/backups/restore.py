"""What `batch backup restore`, `verify --restore` and the drill do: restore a backup when nobody is in the way.

It works beside an idle service and without one, and on a machine where there is no ledger yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock
from service.backup.file.reader import Backup, LocalFile, Source
from service.backup.restoring.count import RestoreReport
from service.backup.restoring.plan import RestorePlan
from service.backup.restoring.restore import planned
from service.backup.restoring.restore import restore as restore_backup
from service.backup.restoring.scratch import restore_into_scratch
from service.batch.ledger import backups, database_time
from service.batch.ledger.backups import Facts
from service.batch.ledger.migration import LEDGER_HISTORY
from service.batch.ledger.states import ACTIVE
from service.batch.ledger.tables import runs
from service.batch.nodes import process_lock
from service.batch.nodes.living import living_nodes
from service.concurrency.stoppable import in_thread
from service.database.histories import APPLICATION_HISTORIES
from service.errors import BackupError, DamagedBackup, DatabaseError
from service.operations.backups.access import BackupAccess
from service.operations.backups.make import (
    Tell,
    create,
    facts_of,
    nobody,
    record_failure,
    refuse_changed,
)
from service.operations.results import Result

HISTORIES = (*APPLICATION_HISTORIES, LEDGER_HISTORY)
MOST_NAMED = 5


@dataclass(frozen=True)
class RestoreRequest:
    """A restore as a person asks for it. `force`: also beneath other nodes. `safety`: back up first what is there.
    `changed`: also a backup that is not as we made it."""

    backup: str
    dry_run: bool = False
    force: bool = False
    safety: bool = True
    changed: bool = False


class Restored(Result):
    """`safety`: the path of the backup of what was there before; None where nothing was, or none was request."""

    report: RestoreReport
    safety: str | None


@dataclass(frozen=True)
class Activity:
    """Who lives, and what may write: nodes, and active runs that some node holds or could take up at any moment.

    `ended`: runs that are over since an instant. `at`: the ledger's time; None where there is no ledger yet.
    """

    nodes: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    ended: tuple[str, ...] = ()
    at: datetime | None = None

    def refuse(self, force: bool, plan: RestorePlan | None = None) -> None:
        """Raises BackupError where a restore would be wrong; with `plan` also for what that would replace."""
        if self.runs:
            raise BackupError(
                f"nothing is restored while runs are active: {_some(self.runs)}. Let them end, or `batch cancel` them"
            )
        if self.ended:
            raise BackupError(
                f"nothing was restored: {_some(self.ended)} has ended since what is there was backed up, and what it "
                "wrote would be lost. Stop the service, or pause the task (--no-safety restores all the same)"
            )
        if self.nodes and not force:
            raise BackupError(
                f"nothing is restored while a service runs: {_some(self.nodes)}. Stop it, or restore beneath it "
                "by --force"
            )
        if self.nodes and plan is not None and plan.holds_ledger:
            raise BackupError(
                f"the backup holds the ledger, by which a service runs: {_some(self.nodes)}. Stop it: --force is not "
                "enough"
            )


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


async def activity(access: BackupAccess, since: datetime | None = None) -> Activity:
    """Nothing where there is no ledger yet. Raises DatabaseError."""
    return await access.recorded(partial(_activity, access, since), reads=True) or Activity()


async def _activity(access: BackupAccess, since: datetime | None, connection: AsyncConnection) -> Activity:
    """What was running on a node that is dead is as interrupted as it will be called: nothing takes it up meanwhile."""
    now = await database_time.now_of(connection)
    folder = process_lock.folder_of(access.settings.ledger_url)
    living = await living_nodes(connection, folder, access.settings.LEASE_SECONDS)
    active = await _those(connection, runs.c.state.in_(ACTIVE)) if living else ()
    ended = await _those(connection, runs.c.started_at.is_not(None), runs.c.finished_at >= since) if since else ()
    return Activity(tuple(living), active, ended, now)


async def _those(connection: AsyncConnection, *conditions: Any) -> tuple[str, ...]:
    found = select(runs.c.id, runs.c.task, runs.c.state).where(*conditions).order_by(runs.c.created_at)
    return tuple(f"{row.task} {row.id} ({row.state})" for row in await connection.execute(found))


async def plan_of(access: BackupAccess, request: RestoreRequest) -> RestorePlan:
    """What would be done, and what is in the way. Raises BackupError where there is no such backup."""
    source = await in_thread(lambda _: access.places.find(request.backup))
    try:
        await _own_facts(access, source, request)
        _, plan = await _planned(access, source)
    finally:
        await in_thread(lambda _: source.__exit__(None, None, None))
    return plan


async def plan_if_possible(access: BackupAccess, request: RestoreRequest) -> RestorePlan:
    """What would be done. Raises BackupError where something is in the way, or there is no such backup."""
    found = await activity(access)
    found.refuse(request.force)
    plan = await plan_of(access, request)
    plan.refuse()
    found.refuse(request.force, plan)
    return plan


async def _planned(access: BackupAccess, source: Source) -> tuple[str, RestorePlan]:
    """The database's URL, and what would be done. In an empty one the application has to own what is made."""
    _, url = access.settings.backup_database
    plan = await planned(source, url, histories=HISTORIES)
    if plan.is_new and url != access.settings.DATABASE_URL:
        url = access.settings.DATABASE_URL
        plan = await planned(source, url, histories=HISTORIES)
    return url, plan


async def restore(access: BackupAccess, request: RestoreRequest, tell: Tell = nobody) -> Restored:
    """Restore the application's database from a backup, after a backup of what is there.

    Runs are looked for twice: at first, and when no other connection can write to the tables any more. One that begins
    after that waits, and finds the restored rows; one that ended since the backup of what is there would be in neither.
    Raises BackupError; then everything is as it was.
    """
    plan: RestorePlan | None = None
    since: datetime | None = None

    async def last_check() -> None:
        (await activity(access, since)).refuse(request.force, plan)

    await last_check()
    source = await in_thread(lambda _: access.places.find(request.backup))
    try:
        facts = await _own_facts(access, source, request)
        url, plan = await _planned(access, source)
        found = await activity(access)
        found.refuse(request.force, plan)
        plan.refuse()
        safety = await _safety(access, plan, tell) if request.safety and not request.dry_run else None
        since = found.at if safety else None
        with _saying_where(safety):
            report = await restore_backup(
                source,
                url,
                dry_run=request.dry_run,
                last_check=last_check,
                on_progress=lambda p: tell(p.bytes, p.estimate, p.stage),
                folder=access.settings.BACKUP_DIR,
                histories=HISTORIES,
            )
        if facts and not request.dry_run:
            await _record(access, source, facts, was_real=True, is_sound=not request.changed)
    finally:
        await in_thread(lambda _: source.__exit__(None, None, None))
    return Restored(report=report, safety=safety)


@contextmanager
def _saying_where(safety: str | None) -> Iterator[None]:
    """Who tries again by `latest` would restore what is there."""
    try:
        yield
    except (BackupError, DatabaseError) as error:
        if safety is None:
            raise
        message = f"{error.message.rstrip('.')}. `latest` is now {safety}, of what is there"
        raise type(error)(message) from error


async def _safety(access: BackupAccess, plan: RestorePlan, tell: Tell) -> str | None:
    """A backup of what is there, which holds all that the restore replaces."""
    if plan.is_new and not plan.rows:
        return None
    try:
        done = await create(access, tell)
    except BackupError as error:
        raise BackupError(
            f"nothing was restored, for what is there could not be backed up first: {error.message} (--no-safety "
            "restores without)"
        ) from error
    held = await in_thread(lambda _: _tables_of(done.path))
    if missing := sorted(plan.rows.keys() & {str(table) for table in plan.tables} - held):
        raise BackupError(
            f"nothing was restored, for the backup of what is there, {done.path}, leaves out {_some(missing)}: look at "
            "BACKUP_INCLUDE, BACKUP_EXCLUDE and BACKUP_LEDGER (--no-safety restores all the same)"
        )
    return done.path


def _tables_of(path: str) -> set[str]:
    with LocalFile(Path(path)) as source:
        return {str(table) for table in Backup.open(source).tables}


async def check_by_restoring(access: BackupAccess, backup: str, tell: Tell = nobody) -> RestoreReport:
    """Prove that a backup loads, where nobody sees it; what comes of it is recorded. Raises BackupError."""
    source = await in_thread(lambda _: access.places.find(backup))
    try:
        facts = await _own_facts(access, source)
        report = await restore_into_scratch(
            source,
            access.settings.backup_database[1],
            drill_url=access.settings.RESTORE_DRILL_URL,
            on_progress=lambda p: tell(p.bytes, p.estimate, p.stage),
            folder=access.settings.BACKUP_DIR,
            histories=HISTORIES,
        )
        if facts:
            await _record(access, source, facts, was_real=False)
    except DamagedBackup as error:
        await record_failure(access, source, error.message)
        raise
    finally:
        await in_thread(lambda _: source.__exit__(None, None, None))
    return report


async def _own_facts(access: BackupAccess, source: Source, request: RestoreRequest | None = None) -> Facts | None:
    """None: it is somebody else's file, of which nothing is recorded. Raises DamagedBackup where it was changed since
    we made it, unless that is `wanted`."""
    if access.place_of(source.name) is None:
        return None
    facts = await in_thread(lambda _: facts_of(source, Path(source.name).name))
    if request is None or not request.changed:
        await refuse_changed(access, source, facts, " (--changed restores it all the same)" if request else "")
    return facts


async def _record(access: BackupAccess, source: Source, facts: Facts, *, was_real: bool, is_sound: bool = True) -> None:
    """That the backup loads, and whether it was into the application's database. What was done is done without it."""
    place = access.place_of(source.name)
    assert place is not None

    async def write(connection: AsyncConnection) -> None:
        await backups.record(connection, facts, place, clock.now())
        if is_sound:
            await backups.verified(connection, facts.name, place, backups.RESTORED, clock.now())
        if was_real:
            await backups.restored(connection, facts.name, place, clock.now())

    await access.noted(facts.name, write)
