"""Restores a backup into a PostgreSQL database, in one transaction of the owner of the tables.

Connections that read or write one of the tables meanwhile wait for the end of the transaction.
After an error, a cancel or a kill the database is unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import asyncpg
from sqlalchemy.engine import URL

from batch_system import clock
from batch_system.backup.file.progress import BackupMeter
from batch_system.backup.file.reader import Backup, SavedSequence
from batch_system.backup.file.selection import is_ledgers, quoted
from batch_system.backup.postgresql import server, target
from batch_system.backup.postgresql.server import LastCheck
from batch_system.backup.postgresql.target import ForeignKey, Target, TargetRelation, TargetSequence
from batch_system.backup.restoring import migrated
from batch_system.backup.restoring import plan as plans
from batch_system.backup.restoring.count import RestoreReport, checked_counts
from batch_system.backup.restoring.loading import load
from batch_system.backup.restoring.plan import RestorePlan
from batch_system.concurrency.stoppable import Stop, in_own_loop
from batch_system.database.migrate import History
from batch_system.database.urls import safe_url
from batch_system.errors import BackupError, DamagedBackup

INTEGERS = ("smallint", "integer", "bigint")
ENABLE = {"O": "ENABLE", "A": "ENABLE ALWAYS", "R": "ENABLE REPLICA"}


def plan(backup: Backup, url: URL, stop: Stop, histories: Sequence[History]) -> RestorePlan:
    """Plan a restore, in a transaction that is rolled back. Raises BackupError and Stopped."""
    with server.explained(url):
        return in_own_loop(_rolled_back_plan(backup, url, histories), stop)


async def _rolled_back_plan(backup: Backup, url: URL, histories: Sequence[History]) -> RestorePlan:
    async with server.connected(url) as connection:
        transaction = connection.transaction(isolation="read_committed")
        await transaction.start()
        try:
            return await _planned(connection, backup, url, histories)
        finally:
            await _roll_back(connection, transaction)


async def _planned(
    connection: Any, backup: Backup, url: URL, histories: Sequence[History]
) -> RestorePlan:
    """Plan the restore, after making the tables that it would make, so that the plan has all
    problems.
    """
    present = await target.read_target(connection)
    relations = [present.find(table.schema, table.name) for table in plans.restored_tables(backup)]
    visible = [
        each
        for each in relations
        if each and each.kind == "r" and each.is_owned and not each.is_hidden
    ]
    rows = await count(connection, visible)
    if not await migrated.make_missing(connection, backup, histories):
        return plans.for_postgresql(
            backup, url, present, await revisions(connection, present), rows
        )
    migrated_target = await target.read_target(connection)
    present_revisions = await revisions(connection, migrated_target)
    plan = plans.for_postgresql(backup, url, migrated_target, present_revisions, rows)
    note = f"the database is empty: the tables of migration {backup.header.revision} are made first"
    return replace(plan, notes=(note, *plan.notes), is_new=True)


def run(
    backup: Backup,
    url: URL,
    meter: BackupMeter,
    stop: Stop,
    histories: Sequence[History],
    *,
    dry_run: bool,
    last_check: LastCheck | None,
) -> RestoreReport:
    """Restore the backup; `dry_run`: roll back at the end. Raises BackupError and Stopped."""
    with server.explained(url):
        return in_own_loop(_restore(backup, url, meter, histories, dry_run, last_check), stop)


async def _restore(
    backup: Backup,
    url: URL,
    meter: BackupMeter,
    histories: Sequence[History],
    dry_run: bool,
    last_check: LastCheck | None,
) -> RestoreReport:
    started = clock.monotonic()
    async with server.connected(url) as connection:
        # The transaction sees what other connections commit meanwhile.
        transaction = connection.transaction(isolation="read_committed")
        await transaction.start()
        try:
            transaction_id = await connection.fetchval(
                "SELECT pg_catalog.pg_current_xact_id()::text"
            )
            await migrated.make_missing(connection, backup, histories)
            restore = await _locked(connection, backup, url, last_check)
            rows = await restore.replace(backup, meter)
            counts = checked_counts(backup.source.name, restore.plan.tables, *rows)
        except BaseException:
            await _roll_back(connection, transaction)
            raise
        if dry_run:
            await transaction.rollback()
        else:
            await server.commit(connection, url, transaction, transaction_id)
    seconds = clock.monotonic() - started
    return RestoreReport(
        backup.source.name, safe_url(url), counts, seconds, dry_run, restore.plan.notes
    )


async def _roll_back(connection: Any, transaction: Any) -> None:
    """Roll back before the connection is closed, so that the locks are released at once."""
    if not connection.is_closed():
        await transaction.rollback()


async def revisions(connection: Any, database: Target) -> dict[str, str]:
    """The revisions of a database by the names of its version tables."""
    recorded: dict[str, str] = {}
    for relation in database.relations.values():
        if relation.kind == "r" and [column.name for column in relation.columns] == ["version_num"]:
            rows = await connection.fetch(f"SELECT version_num FROM {relation.sql} ORDER BY 1")
            recorded[str(relation)] = ", ".join(row["version_num"] for row in rows)
    return recorded


async def count(connection: Any, relations: Iterable[TargetRelation]) -> dict[str, int]:
    """How many rows each table has, by its name."""
    return {
        str(relation): await connection.fetchval(f"SELECT count(*) FROM ONLY {relation.sql}")
        for relation in relations
    }


async def _locked(
    connection: Any, backup: Backup, url: URL, last_check: LastCheck | None
) -> PostgresqlRestore:
    """Lock all tables, and plan the restore. The ledger's tables are locked last, because
    `last_check` reads them.
    """
    tables = plans.restored_tables(backup)
    before = await target.read_target(connection)
    restored = [relation for table in tables if (relation := before.find(table.schema, table.name))]
    plans.for_postgresql(backup, url, before, await revisions(connection, before), {}).refuse()
    keys = before.keys_of(restored)
    ids = {r.id for r in restored} | {key.holder for key in keys} | {key.referred for key in keys}
    owned = [
        before.relations[number] for number in sorted(ids) if before.relations[number].is_owned
    ]
    await server.lock(connection, url, [(r.id, r.sql) for r in owned if not is_ledgers(r.name)])
    if last_check is not None:
        await last_check()
    await server.lock(connection, url, [(r.id, r.sql) for r in owned if is_ledgers(r.name)])
    locked = await target.read_target(connection)
    plan = plans.for_postgresql(backup, url, locked, await revisions(connection, locked), {})
    plan.refuse()
    return PostgresqlRestore.of(connection, plan, locked)


@dataclass(frozen=True)
class PostgresqlRestore:
    """A planned restore in the current transaction of `connection`. `relations`: the tables of the
    plan, in order.
    """

    connection: Any
    plan: RestorePlan
    target: Target
    relations: Sequence[TargetRelation]

    @classmethod
    def of(cls, connection: Any, plan: RestorePlan, database: Target) -> Self:
        """`plan`: one without problems, so all of its tables exist."""
        relations = [database.find(table.schema, table.name) for table in plan.tables]
        return cls(
            connection, plan, database, [relation for relation in relations if relation is not None]
        )

    async def replace(
        self, backup: Backup, meter: BackupMeter
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Replace the rows of the tables. Returns how many rows each had before and has now, by its
        name.

        Raises BackupError.
        """
        keys = self.target.keys_of(self.relations)
        await self._disable_checks(keys)
        before = await count(self.connection, self.relations)
        if self.relations:
            await self._execute(
                "TRUNCATE " + ", ".join(f"ONLY {relation.sql}" for relation in self.relations)
            )
        meter.begin("restoring", sum(table.bytes for table in self.plan.tables))
        after = {}
        for table, relation in zip(self.plan.tables, self.relations, strict=True):
            after[str(table)] = await load(
                self.connection, backup, table, (relation.place, relation.name), meter
            )
        await self._execute("SET CONSTRAINTS ALL IMMEDIATE")
        for sequence in backup.sequences:
            await self._set_sequence(sequence)
        meter.begin("checking keys", 0)
        for key in keys:
            await self._add_key(key)
        await self._enable_checks()
        return before, after

    async def _execute(self, statement: str) -> None:
        await self.connection.execute(statement)

    async def _disable_checks(self, keys: Sequence[ForeignKey]) -> None:
        """Drop the foreign keys, and disable triggers and forced row security."""
        for key in keys:
            await self._execute(
                f"ALTER TABLE {self._sql(key.holder)} DROP CONSTRAINT {quoted(key.name)}"
            )
        for relation in self.relations:
            await self._execute(f"ALTER TABLE {relation.sql} DISABLE TRIGGER USER")
            if relation.is_forced:
                await self._execute(f"ALTER TABLE {relation.sql} NO FORCE ROW LEVEL SECURITY")

    async def _add_key(self, key: ForeignKey) -> None:
        holder = self._sql(key.holder)
        try:
            await self._execute(
                f"ALTER TABLE {holder} ADD CONSTRAINT {quoted(key.name)} {key.text}"
            )
        except asyncpg.ForeignKeyViolationError as error:
            if {key.holder, key.referred} <= self.target.with_parents(self.relations):
                raise DamagedBackup(
                    f"rows of {self.target.relations[key.holder]} in the backup {self.plan.backup} "
                    f"refer to rows of {self.target.relations[key.referred]} that the backup does "
                    f"not have: {server.cause_of(error)}. Nothing was changed"
                ) from error
            raise BackupError(
                f"after the restore, rows of {self.target.relations[key.holder]} would refer to "
                f"rows that do not exist, so nothing was changed: {server.cause_of(error)}"
            ) from error
        if key.comment is not None:
            comment = await self.connection.fetchval(
                "SELECT pg_catalog.quote_literal($1::text)", key.comment
            )
            await self._execute(
                f"COMMENT ON CONSTRAINT {quoted(key.name)} ON {holder} IS {comment}"
            )

    async def _set_sequence(self, saved: SavedSequence) -> None:
        """Set a sequence to the saved value, or to that of the last row if that is further.

        setval() alone is not undone by a rollback, but it is after ALTER SEQUENCE RESTART.
        """
        relation = self.target.find(saved.schema, saved.name)
        sequence = self.target.sequences.get(relation.id) if relation else None
        if (
            relation is None
            or sequence is None
            or not self._is_restored(sequence.relation, relation)
        ):
            return
        value, is_called = saved.last_value, saved.is_called
        if (
            sequence.relation is not None
            and sequence.column is not None
            and self._has_integer_column(sequence)
        ):
            function = "max" if sequence.step > 0 else "min"
            column, table = quoted(sequence.column), self._sql(sequence.relation)
            last = await self.connection.fetchval(
                f"SELECT {function}({column})::bigint FROM {table}"
            )
            is_past = last is not None and (last - value) * sequence.step >= 0
            if is_past and sequence.least <= last <= sequence.most:
                value, is_called = last, True
        await self._execute(f"ALTER SEQUENCE {relation.sql} RESTART")
        setval = "SELECT pg_catalog.setval($1::oid::regclass, $2, $3)"
        await self.connection.execute(setval, relation.id, value, is_called)

    def _has_integer_column(self, sequence: TargetSequence) -> bool:
        """Whether the column of the sequence has the type of an integer, and not that of a text
        made from one.
        """
        columns = self.target.relations[sequence.relation].columns if sequence.relation else ()
        return any(column.name == sequence.column and column.type in INTEGERS for column in columns)

    def _is_restored(self, owner: int | None, sequence: TargetRelation) -> bool:
        """Whether the table that owns the sequence is restored; without an owner, whether it is not
        the ledger's.
        """
        if owner is None:
            return not is_ledgers(sequence.name)
        return owner in self.target.with_parents(self.relations)

    async def _enable_checks(self) -> None:
        """Enable triggers and forced row security again, as they were."""
        restored = {relation.id: relation for relation in self.relations}
        for trigger in self.target.triggers:
            if trigger.relation in restored and (enable := ENABLE.get(trigger.state)):
                table = restored[trigger.relation].sql
                await self._execute(f"ALTER TABLE {table} {enable} TRIGGER {quoted(trigger.name)}")
        for relation in self.relations:
            if relation.is_forced:
                await self._execute(f"ALTER TABLE {relation.sql} FORCE ROW LEVEL SECURITY")

    def _sql(self, number: int) -> str:
        return self.target.relations[number].sql
