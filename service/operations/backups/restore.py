"""Restores backups, and tries restores out, for `batch backup restore`, `batch backup verify --restore` and the drill.

It works beside an idle service and without one, and also on a machine without a ledger.
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
    OnProgress,
    create,
    facts_of,
    ignore_progress,
    record_failure,
    refuse_changed,
)
from service.operations.results import Result

HISTORIES = (*APPLICATION_HISTORIES, LEDGER_HISTORY)
MOST_NAMED = 5


@dataclass(frozen=True)
class RestoreRequest:
    """The request for a restore.

    Attributes:
        backup: A path, a name, `latest`, or s3://bucket/prefix/name.
        dry_run: Roll the restore back at its end.
        force: Restore also while a service runs, if it has no active run.
        safety: Make a backup of the database before the restore.
        changed: Restore also a backup that was changed since it was made.
    """

    backup: str
    dry_run: bool = False
    force: bool = False
    safety: bool = True
    changed: bool = False


class RestoreResult(Result):
    """The outcome of a restore. `safety`: the path of the backup that was made before it; None if none was made."""

    report: RestoreReport
    safety: str | None


@dataclass(frozen=True)
class Activity:
    """What may write to the database: living nodes, and active runs that a living node executes or could start.

    `ended`: runs that have ended since a given instant. `at`: the ledger's time (UTC); None without a ledger.
    """

    nodes: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    ended: tuple[str, ...] = ()
    at: datetime | None = None

    def refuse(self, force: bool, plan: RestorePlan | None = None) -> None:
        """Raises BackupError if a restore could lose data; with `plan` also if it would replace the ledger in use."""
        if self.runs:
            raise BackupError(
                f"nothing is restored while runs are active: {_some(self.runs)}. Let them end, or `batch cancel` them"
            )
        if self.ended:
            raise BackupError(
                f"nothing was restored: {_some(self.ended)} has ended since the backup that was made before the "
                "restore, and what it wrote would be lost. Stop the service, or pause the task (--no-safety restores "
                "nevertheless)"
            )
        if self.nodes and not force:
            raise BackupError(
                f"nothing is restored while a service runs: {_some(self.nodes)}. Stop it, or restore while it runs, "
                "by --force"
            )
        if self.nodes and plan is not None and plan.holds_ledger:
            raise BackupError(
                f"the backup holds the ledger, which a running service uses: {_some(self.nodes)}. Stop the service: "
                "--force does not allow this"
            )


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


async def activity(access: BackupAccess, since: datetime | None = None) -> Activity:
    """What may write to the database, and the runs that ended since `since` (UTC). Raises DatabaseError."""
    return await access.in_ledger(partial(_activity, access, since), reads=True) or Activity()


async def _activity(access: BackupAccess, since: datetime | None, connection: AsyncConnection) -> Activity:
    """Without a living node no run is active: nothing resumes the runs of dead nodes meanwhile."""
    now = await database_time.now_of(connection)
    folder = process_lock.folder_of(access.settings.ledger_url)
    living = await living_nodes(connection, folder, access.settings.LEASE_SECONDS)
    active = await _run_names(connection, runs.c.state.in_(ACTIVE)) if living else ()
    ended = await _run_names(connection, runs.c.started_at.is_not(None), runs.c.finished_at >= since) if since else ()
    return Activity(tuple(living), active, ended, now)


async def _run_names(connection: AsyncConnection, *conditions: Any) -> tuple[str, ...]:
    statement = select(runs.c.id, runs.c.task, runs.c.state).where(*conditions).order_by(runs.c.created_at)
    return tuple(f"{row.task} {row.id} ({row.state})" for row in await connection.execute(statement))


async def plan_of(access: BackupAccess, request: RestoreRequest) -> RestorePlan:
    """Plan a restore; the plan lists the problems. Raises BackupError if there is no such backup."""
    source = await in_thread(lambda _: access.places.find(request.backup))
    try:
        await _own_facts(access, source, request)
        _, plan = await _planned(access, source)
    finally:
        await in_thread(lambda _: source.__exit__(None, None, None))
    return plan


async def plan_if_possible(access: BackupAccess, request: RestoreRequest) -> RestorePlan:
    """Plan a restore. Raises BackupError if the restore would be refused, or if there is no such backup."""
    active = await activity(access)
    active.refuse(request.force)
    plan = await plan_of(access, request)
    plan.refuse()
    active.refuse(request.force, plan)
    return plan


async def _planned(access: BackupAccess, source: Source) -> tuple[str, RestorePlan]:
    """The URL to restore by, and the plan. In an empty database the role of DATABASE_URL has to own the new tables."""
    _, url = access.settings.backup_database
    plan = await planned(source, url, histories=HISTORIES)
    if plan.is_new and url != access.settings.DATABASE_URL:
        url = access.settings.DATABASE_URL
        plan = await planned(source, url, histories=HISTORIES)
    return url, plan


async def restore(
    access: BackupAccess, request: RestoreRequest, on_progress: OnProgress = ignore_progress
) -> RestoreResult:
    """Restore the application's database from a backup, after making a backup of the database as it is.

    Active runs are looked for twice: at first, and when no other connection can write to the tables. A run that starts
    after that waits, and then finds the restored rows. A run that ended since the new backup prevents the restore,
    because the new backup does not have what it wrote. Raises BackupError; the database is unchanged then.
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
        active = await activity(access)
        active.refuse(request.force, plan)
        plan.refuse()
        safety = await _back_up_first(access, plan, on_progress) if request.safety and not request.dry_run else None
        since = active.at if safety else None
        with _naming_backup(safety):
            report = await restore_backup(
                source,
                url,
                dry_run=request.dry_run,
                last_check=last_check,
                on_progress=lambda p: on_progress(p.bytes, p.estimate, p.stage),
                folder=access.settings.BACKUP_DIR,
                histories=HISTORIES,
            )
        if facts and not request.dry_run:
            await _record(access, source, facts, was_real=True, is_sound=not request.changed)
    finally:
        await in_thread(lambda _: source.__exit__(None, None, None))
    return RestoreResult(report=report, safety=safety)


@contextmanager
def _naming_backup(safety: str | None) -> Iterator[None]:
    """Add to an error that `latest` now means the backup `safety`, so that nobody restores that by mistake."""
    try:
        yield
    except (BackupError, DatabaseError) as error:
        if safety is None:
            raise
        message = f"{error.message.rstrip('.')}. `latest` is now {safety}, the backup made before the restore"
        raise type(error)(message) from error


async def _back_up_first(access: BackupAccess, plan: RestorePlan, on_progress: OnProgress) -> str | None:
    """Make a backup that has all tables that the restore replaces, and return its path; None for a new database."""
    if plan.is_new and not plan.rows:
        return None
    try:
        backup = await create(access, on_progress)
    except BackupError as error:
        raise BackupError(
            f"nothing was restored, because the database could not be backed up first: {error.message} (--no-safety "
            "restores without a backup)"
        ) from error
    saved = await in_thread(lambda _: _tables_of(backup.path))
    if missing := sorted(plan.rows.keys() & {str(table) for table in plan.tables} - saved):
        raise BackupError(
            f"nothing was restored, because the backup made before it, {backup.path}, leaves out {_some(missing)}: "
            "look at BACKUP_INCLUDE, BACKUP_EXCLUDE and BACKUP_LEDGER (--no-safety restores nevertheless)"
        )
    return backup.path


def _tables_of(path: str) -> set[str]:
    with LocalFile(Path(path)) as source:
        return {str(table) for table in Backup.open(source).tables}


async def check_by_restoring(
    access: BackupAccess, backup: str, on_progress: OnProgress = ignore_progress
) -> RestoreReport:
    """Prove that a backup loads into a scratch place, and record the outcome. Raises BackupError."""
    source = await in_thread(lambda _: access.places.find(backup))
    try:
        facts = await _own_facts(access, source)
        report = await restore_into_scratch(
            source,
            access.settings.backup_database[1],
            drill_url=access.settings.RESTORE_DRILL_URL,
            on_progress=lambda p: on_progress(p.bytes, p.estimate, p.stage),
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
    """The facts of a backup in BACKUP_DIR or at BACKUP_URL; None for another file, of which nothing is recorded.

    Raises DamagedBackup if it was changed since it was made, unless the request allows that.
    """
    if access.place_of(source.name) is None:
        return None
    facts = await in_thread(lambda _: facts_of(source, Path(source.name).name))
    if request is None or not request.changed:
        await refuse_changed(access, source, facts, " (--changed restores it nevertheless)" if request else "")
    return facts


async def _record(access: BackupAccess, source: Source, facts: Facts, *, was_real: bool, is_sound: bool = True) -> None:
    """Record that the backup loads, and if `was_real`, that the application's database was restored from it."""
    place = access.place_of(source.name)
    assert place is not None

    async def write(connection: AsyncConnection) -> None:
        await backups.record(connection, facts, place, clock.now())
        if is_sound:
            await backups.mark_verified(connection, facts.name, place, backups.RESTORED, clock.now())
        if was_real:
            await backups.mark_restored(connection, facts.name, place, clock.now())

    await access.record_if_possible(facts.name, write)
