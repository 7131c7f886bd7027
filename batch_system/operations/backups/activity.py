"""What may write to the application's database while it is restored, and why a restore is refused
because of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.backup.restoring.plan import RestorePlan
from batch_system.batch.ledger import database_time
from batch_system.batch.ledger.states import ACTIVE
from batch_system.batch.ledger.tables import NO_PART_SQL, PART_SQL, runs
from batch_system.batch.nodes import process_lock
from batch_system.batch.nodes.living import living_nodes
from batch_system.errors import BackupError
from batch_system.operations.backups.access import BackupAccess

MOST_NAMED = 5


@dataclass(frozen=True)
class Activity:
    """What may write to the database: living nodes, and active runs that a living node executes or
    could start.

    `ended`: runs that have ended since a given instant. `at`: the ledger's time (UTC); None without
    a ledger.
    """

    nodes: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    ended: tuple[str, ...] = ()
    at: datetime | None = None

    def refuse(self, force: bool, plan: RestorePlan | None = None) -> None:
        """Raises BackupError if a restore could lose data; with `plan` also if it would replace the
        ledger in use.
        """
        if (objection := self.objection(force, plan)) is not None:
            raise BackupError(objection)

    def objection(self, force: bool, plan: RestorePlan | None = None) -> str | None:
        """Why a restore is refused; None if it is not."""
        if self.runs:
            return (
                f"nothing is restored while runs are active: {some(self.runs)}. Let them end, or "
                "`batch cancel` them"
            )
        if self.ended:
            return (
                f"nothing was restored: {some(self.ended)} has ended since the backup that was "
                "made before the restore, and what it wrote would be lost. Stop the service, or "
                "pause the task (--no-safety restores nevertheless)"
            )
        if self.nodes and not force:
            return (
                f"nothing is restored while a service runs: {some(self.nodes)}. Stop it, or "
                "restore while it runs, "
                "by --force"
            )
        if self.nodes and plan is not None and plan.holds_ledger:
            return (
                f"the backup holds the ledger, which a running service uses: {some(self.nodes)}. "
                "Stop the service: "
                "--force does not allow this"
            )
        return None


def some(names: Sequence[str]) -> str:
    """The first few of the names, and how many more there are."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


async def activity(access: BackupAccess, since: datetime | None = None) -> Activity:
    """What may write to the database, and the runs that ended since `since` (UTC). Raises
    DatabaseError.
    """
    return await access.in_ledger(partial(_activity, access, since), reads=True) or Activity()


async def _activity(
    access: BackupAccess, since: datetime | None, connection: AsyncConnection
) -> Activity:
    """Without a living node no run is active: nothing resumes the runs of dead nodes meanwhile."""
    now = await database_time.now_of(connection)
    folder = process_lock.folder_of(access.settings.ledger_url)
    living = await living_nodes(connection, folder, access.settings.LEASE_SECONDS)
    active: tuple[str, ...] = ()
    for kind in (NO_PART_SQL, PART_SQL) if living else ():  # each has its index
        active += await _run_names(connection, runs.c.state.in_(ACTIVE), text(kind))
    ended = (
        await _run_names(connection, runs.c.started_at.is_not(None), runs.c.finished_at >= since)
        if since
        else ()
    )
    return Activity(tuple(living), active, ended, now)


async def _run_names(connection: AsyncConnection, *conditions: Any) -> tuple[str, ...]:
    statement = (
        select(runs.c.id, runs.c.task, runs.c.state).where(*conditions).order_by(runs.c.created_at)
    )
    return tuple(
        f"{row.task} {row.id} ({row.state})" for row in await connection.execute(statement)
    )
