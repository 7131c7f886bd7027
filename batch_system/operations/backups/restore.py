"""Restores backups, and tries restores out, for `batch backup restore`, `batch backup verify
--restore` and the drill.

It works beside an idle service and without one, and also on a machine without a ledger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.backup.file.progress import BackupProgress
from batch_system.backup.file.reader import Backup, LocalFile, Source
from batch_system.backup.restoring.count import RestoreReport
from batch_system.backup.restoring.plan import RestorePlan
from batch_system.backup.restoring.restore import planned
from batch_system.backup.restoring.restore import restore as restore_backup
from batch_system.backup.restoring.scratch import address, restore_into_scratch
from batch_system.batch.ledger import backups
from batch_system.batch.ledger.backups import Facts
from batch_system.concurrency.stoppable import in_thread
from batch_system.database.migrate import History
from batch_system.database.urls import safe_url
from batch_system.errors import BackupError, DamagedBackup, DatabaseError, InvalidParameters
from batch_system.operations.asking.results import Result
from batch_system.operations.backups.access import BackupAccess
from batch_system.operations.backups.activity import Activity, activity, some
from batch_system.operations.backups.make import (
    create,
    facts_of,
    record_failure,
    refuse_changed,
)
from batch_system.operations.backups.progress import OnProgress, ignore_progress
from batch_system.settings.settings import Settings
from batch_system.settings.urls import async_url

BESIDE_A_SERVICE = (
    "a service runs, so that this dry run loads the rows into a scratch place, which it removes "
    "again"
)


@dataclass(frozen=True)
class RestoreRequest:
    """The request for a restore.

    Attributes:
        backup: A path, a name, `latest`, or s3://bucket/prefix/name.
        dry_run: Roll the restore back at its end.
        force: Restore also while a service runs, if it has no active run.
        safety: Make a backup of the database before the restore.
        changed: Restore also a backup that was changed since it was made.
        into: The URL of another empty database to restore into. None: the application's database.
    """

    backup: str
    dry_run: bool = False
    force: bool = False
    safety: bool = True
    changed: bool = False
    into: str | None = field(default=None, repr=False)


class RestoreResult(Result):
    """The outcome of a restore. `safety`: the path of the backup that was made before it; None if
    none was made.
    """

    report: RestoreReport
    safety: str | None


async def plan_of(access: BackupAccess, request: RestoreRequest) -> RestorePlan:
    """Plan a restore; the plan lists the problems. Raises BackupError if there is no such
    backup.
    """
    source = await in_thread(lambda _: access.places.find(request.backup))
    try:
        await _own_facts(access, source, request)
        _, plan = await _planned(access, source, request.into)
    finally:
        await in_thread(lambda _: source.__exit__(None, None, None))
    return plan


async def plan_if_possible(access: BackupAccess, request: RestoreRequest) -> RestorePlan:
    """Plan a restore. Raises BackupError if the restore would be refused, or if there is no such
    backup.

    A running service does not prevent a dry run: the notes of its plan say why a restore would be
    refused.
    """
    active = await activity(access) if request.into is None else Activity()
    if not request.dry_run:
        active.refuse(request.force)
    plan = await plan_of(access, request)
    plan.refuse()
    if not request.dry_run:
        active.refuse(request.force, plan)
    elif (objection := active.objection(request.force, plan)) is not None:
        plan = replace(plan, notes=(*plan.notes, f"a restore would be refused now: {objection}"))
    if request.dry_run and active.nodes:
        plan = replace(plan, notes=(*plan.notes, BESIDE_A_SERVICE))
    return plan


async def _planned(
    access: BackupAccess, source: Source, into: str | None = None
) -> tuple[str, RestorePlan]:
    """The URL for the restore, and the plan. In an empty database the role of DATABASE_URL has to
    own the new tables.
    """
    if into is not None:
        return await planned_into(access.settings, source, into, access.histories)
    _, url = access.settings.backup_database
    plan = await planned(source, url, histories=access.histories)
    if plan.is_new and url != access.settings.owner_url:
        url = access.settings.owner_url
        plan = await planned(source, url, histories=access.histories)
    return url, plan


async def restore(
    access: BackupAccess, request: RestoreRequest, on_progress: OnProgress = ignore_progress
) -> RestoreResult:
    """Restore the application's database from a backup, after making a backup of the database as it
    is.

    It checks for active runs twice: first, and again once no other connection can write to the
    tables. A run that starts after that waits, and then finds the restored rows. A run that ended
    since the new backup prevents the restore, because the new backup does not have what it wrote.
    Raises BackupError; the database is unchanged then.

    A dry run, and a restore into another database, lose nothing, so a service may run meanwhile.
    """
    if request.dry_run or request.into is not None:
        return RestoreResult(
            report=await _restored_harmlessly(access, request, on_progress), safety=None
        )
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
        safety = await _back_up_first(access, plan, on_progress) if request.safety else None
        since = active.at if safety else None
        with _naming_backup(safety):
            report = await restore_backup(
                source,
                url,
                last_check=last_check,
                on_progress=lambda p: on_progress(p.bytes, p.estimate, p.stage),
                folder=access.settings.BACKUP_DIR,
                histories=access.histories,
            )
        if facts:
            await _record(access, source, facts, was_real=True, is_sound=not request.changed)
    finally:
        await in_thread(lambda _: source.__exit__(None, None, None))
    return RestoreResult(report=report, safety=safety)


async def _restored_harmlessly(
    access: BackupAccess, request: RestoreRequest, on_progress: OnProgress
) -> RestoreReport:
    """A dry run, or a restore into another database. Beside a service, a dry run uses a scratch
    place.
    """
    source = await in_thread(lambda _: access.places.find(request.backup))
    folder = access.settings.BACKUP_DIR
    try:
        facts = await _own_facts(access, source, request)
        url, plan = await _planned(access, source, request.into)
        plan.refuse()

        def tell(progress: BackupProgress) -> None:
            on_progress(progress.bytes, progress.estimate, progress.stage)

        if request.into is None and (await activity(access)).nodes:
            drill_url = access.settings.RESTORE_DRILL_URL
            report = await restore_into_scratch(
                source,
                url,
                drill_url=drill_url,
                on_progress=tell,
                folder=folder,
                histories=access.histories,
            )
            counts = tuple(
                replace(table, before=plan.rows.get(table.table)) for table in report.tables
            )
            return replace(report, tables=counts, where=plan.database)
        report = await restore_backup(
            source,
            url,
            dry_run=request.dry_run,
            on_progress=tell,
            folder=folder,
            histories=access.histories,
            example=example_of(access.settings) if request.into is not None else None,
        )
        if facts and not request.dry_run:
            await _record(access, source, facts, was_real=False, is_sound=not request.changed)
        return report
    finally:
        await in_thread(lambda _: source.__exit__(None, None, None))


@contextmanager
def _naming_backup(safety: str | None) -> Iterator[None]:
    """Add to an error that `latest` now means the backup `safety`, so that nobody restores it by
    mistake.
    """
    try:
        yield
    except (BackupError, DatabaseError) as error:
        if safety is None:
            raise
        message = (
            f"{error.message.rstrip('.')}. `latest` is now {safety}, the backup made before the "
            "restore"
        )
        raise type(error)(message) from error


async def _back_up_first(
    access: BackupAccess, plan: RestorePlan, on_progress: OnProgress
) -> str | None:
    """Make a backup that has all tables that the restore replaces, and return its path; None for a
    new database.
    """
    if plan.is_new and not plan.rows:
        return None
    try:
        backup = await create(access, on_progress)
    except BackupError as error:
        raise BackupError(
            "nothing was restored, because the database could not be backed up first: "
            f"{error.message} (--no-safety restores without a backup)"
        ) from error
    saved = await in_thread(lambda _: _tables_of(backup.path))
    if missing := sorted(plan.rows.keys() & {str(table) for table in plan.tables} - saved):
        raise BackupError(
            f"nothing was restored, because the backup made before it, {backup.path}, leaves out "
            f"{some(missing)}: "
            "look at BACKUP_INCLUDE, BACKUP_EXCLUDE and BACKUP_LEDGER (--no-safety restores "
            "nevertheless)"
        )
    return backup.path


def _tables_of(path: str) -> set[str]:
    with LocalFile(Path(path)) as source:
        return {str(table) for table in Backup.open(source).tables}


async def check_by_restoring(
    access: BackupAccess, backup: str, on_progress: OnProgress = ignore_progress
) -> RestoreReport:
    """Prove that a backup loads into a scratch place, and record the outcome. Raises
    BackupError.
    """
    source = await in_thread(lambda _: access.places.find(backup))
    try:
        facts = await _own_facts(access, source)
        report = await restore_into_scratch(
            source,
            access.settings.backup_database[1],
            drill_url=access.settings.RESTORE_DRILL_URL,
            on_progress=lambda p: on_progress(p.bytes, p.estimate, p.stage),
            folder=access.settings.BACKUP_DIR,
            histories=access.histories,
        )
        if facts:
            await _record(access, source, facts, was_real=False)
    except DamagedBackup as error:
        await record_failure(access, source, error.message)
        raise
    finally:
        await in_thread(lambda _: source.__exit__(None, None, None))
    return report


async def _own_facts(
    access: BackupAccess, source: Source, request: RestoreRequest | None = None
) -> Facts | None:
    """The facts of a backup in BACKUP_DIR or at BACKUP_URL; None for another file, about which
    nothing is recorded.

    Raises DamagedBackup if it was changed since it was made, unless the request allows that.
    """
    if access.place_of(source.name) is None:
        return None
    facts = await in_thread(lambda _: facts_of(source, Path(source.name).name))
    if request is None or not request.changed:
        await refuse_changed(
            access, source, facts, " (--changed restores it nevertheless)" if request else ""
        )
    return facts


async def _record(
    access: BackupAccess, source: Source, facts: Facts, *, was_real: bool, is_sound: bool = True
) -> None:
    """Record that the backup loads, and if `was_real`, that the application's database was restored
    from it.
    """
    place = access.place_of(source.name)
    assert place is not None

    async def write(connection: AsyncConnection) -> None:
        await backups.record(connection, facts, place, clock.now())
        if is_sound:
            await backups.mark_verified(
                connection, facts.name, place, backups.RESTORED, clock.now()
            )
        if was_real:
            await backups.mark_restored(connection, facts.name, place, clock.now())

    await access.record_if_possible(facts.name, write)


async def planned_into(
    settings: Settings, source: Source, into: str, histories: Sequence[History]
) -> tuple[str, RestorePlan]:
    """The URL of another, empty database of the same kind for the restore, and the plan.

    Neither the application's database nor the ledger is touched, so a service may run meanwhile.
    Raises InvalidParameters and BackupError if that database can't be used.
    """
    url = _other_url(settings, into)
    plan = await planned(source, url, histories=histories, example=example_of(settings))
    if not plan.is_new or any(plan.rows.values()):
        raise BackupError(
            f"nothing was restored: the database {plan.database} is not empty. Name an empty one"
        )
    return url, plan


def example_of(settings: Settings) -> Path | None:
    """The application's SQLite file, the model for the tables of an empty file; None on
    PostgreSQL.
    """
    url = make_url(settings.DATABASE_URL)
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


def _other_url(settings: Settings, into: str) -> str:
    """The URL with its driver. Raises InvalidParameters if it is not a URL, or if it names a
    database of the service.
    """
    try:
        url = async_url(into)
    except ValueError as error:
        raise InvalidParameters(f"the database to restore into is {error}") from None
    own = {"DATABASE_URL": settings.DATABASE_URL, "LEDGER_URL": settings.ledger_url}
    for setting, own_url in own.items():
        if _place(make_url(url)) == _place(make_url(own_url)):
            raise InvalidParameters(
                f"the database to restore into, {safe_url(make_url(url))}, is that of {setting}: "
                "name another one"
            )
    return url


def _place(url: URL) -> object:
    """A value that is equal for all URLs of one database."""
    if url.get_backend_name() == "sqlite":
        return Path(url.database or ":memory:").resolve()
    return address(url)
