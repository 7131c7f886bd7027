"""PostgreSQL: a backup's rows in place of the present ones, in one transaction of the tables' owner.

Who reads or writes one of the tables meanwhile waits to its end. A process that is killed on the way, an error and a
cancel leave everything as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import asyncpg
from sqlalchemy.engine import URL

from service import clock
from service.backup.file.progress import BackupMeter
from service.backup.file.reader import Backup, SavedSequence
from service.backup.file.selection import is_ledgers, quoted
from service.backup.postgresql import server, target
from service.backup.postgresql.server import LastCheck
from service.backup.postgresql.target import Counter, Key, Relation, Target
from service.backup.restoring import migrated
from service.backup.restoring import plan as plans
from service.backup.restoring.count import Report, compared
from service.backup.restoring.loading import load
from service.backup.restoring.plan import Plan
from service.backup.restoring.revisions import with_data
from service.concurrency.stoppable import Stop, in_own_loop
from service.database.migrate import History
from service.database.urls import safe_url
from service.errors import BackupError, DamagedBackup

INTEGERS = ("smallint", "integer", "bigint")
ENABLE = {"O": "ENABLE", "A": "ENABLE ALWAYS", "R": "ENABLE REPLICA"}


def plan(backup: Backup, url: URL, stop: Stop, histories: Sequence[History]) -> Plan:
    with server.explained(url):
        return in_own_loop(_look(backup, url, histories), stop)


async def _look(backup: Backup, url: URL, histories: Sequence[History]) -> Plan:
    async with server.connected(url) as connection:
        transaction = connection.transaction(isolation="read_committed")
        await transaction.start()
        try:
            return await _planned(connection, backup, url, histories)
        finally:
            await _roll_back(connection, transaction)


async def _planned(connection: Any, backup: Backup, url: URL, histories: Sequence[History]) -> Plan:
    """Where the tables have to be made first, they are: so all that is in the way is known before it is begun."""
    found = await target.look(connection)
    tables = [found.find(table.schema, table.name) for table in plans.restored(backup)]
    seen = [one for one in tables if one and one.kind == "r" and one.is_owned and not one.is_hidden]
    rows = await count(connection, seen)
    if not await migrated.make_missing(connection, backup, histories):
        return plans.for_postgresql(backup, url, found, await revisions(connection, found), rows)
    made = await target.look(connection)
    plan = plans.for_postgresql(backup, url, made, await revisions(connection, made), rows)
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
) -> Report:
    with server.explained(url):
        return in_own_loop(_restore(backup, url, meter, histories, dry_run, last_check), stop)


async def _restore(
    backup: Backup,
    url: URL,
    meter: BackupMeter,
    histories: Sequence[History],
    dry_run: bool,
    last_check: LastCheck | None,
) -> Report:
    started = clock.monotonic()
    async with server.connected(url) as connection:
        transaction = connection.transaction(isolation="read_committed")  # what others commit meanwhile is seen
        await transaction.start()
        try:
            number = await connection.fetchval("SELECT pg_catalog.pg_current_xact_id()::text")
            await migrated.make_missing(connection, backup, histories)
            work = await _locked(connection, backup, url, last_check)
            counted = compared(backup.source.name, work.plan.tables, *await work.replace(backup, meter))
        except BaseException:
            await _roll_back(connection, transaction)
            raise
        if dry_run:
            await transaction.rollback()
        else:
            await server.commit(connection, url, transaction, number)
    took = clock.monotonic() - started
    return Report(backup.source.name, safe_url(url), counted, took, dry_run, work.plan.notes)


async def _roll_back(connection: Any, transaction: Any) -> None:
    """Here, and not when the server notices: the next one should find no locks."""
    if not connection.is_closed():
        await transaction.rollback()


async def revisions(connection: Any, found: Target) -> dict[str, str]:
    """What each of alembic's tables says, and at which revision our tables are that have none."""
    told: dict[str, str] = {}
    for relation in found.relations.values():
        if relation.kind == "r" and [column.name for column in relation.columns] == ["version_num"]:
            rows = await connection.fetch(f"SELECT version_num FROM {relation.sql} ORDER BY 1")  # noqa: S608 (quoted)
            told[str(relation)] = ", ".join(row["version_num"] for row in rows)
    return with_data(told, map(str, found.relations.values()))


async def count(connection: Any, relations: Iterable[Relation]) -> dict[str, int]:
    return {
        str(relation): await connection.fetchval(f"SELECT count(*) FROM ONLY {relation.sql}")  # noqa: S608 (quoted)
        for relation in relations
    }


async def _locked(connection: Any, backup: Backup, url: URL, last_check: LastCheck | None) -> Work:
    """The work, with all its tables locked. The ledger's come last: `last_check` may have to read them."""
    tables = plans.restored(backup)
    seen = await target.look(connection)
    there = [relation for table in tables if (relation := seen.find(table.schema, table.name))]
    plans.for_postgresql(backup, url, seen, await revisions(connection, seen), {}).refuse()
    holders = {key.holder for key in seen.keys_of(there)} | {key.referred for key in seen.keys_of(there)}
    every = [seen.relations[number] for number in sorted({r.id for r in there} | holders)]
    wanted = [relation for relation in every if relation.is_owned]
    await server.lock(connection, url, [(r.id, r.sql) for r in wanted if not is_ledgers(r.name)])
    if last_check is not None:
        await last_check()
    await server.lock(connection, url, [(r.id, r.sql) for r in wanted if is_ledgers(r.name)])
    found = await target.look(connection)
    made = plans.for_postgresql(backup, url, found, await revisions(connection, found), {})
    made.refuse()
    return Work.of(connection, made, found)


@dataclass(frozen=True)
class Work:
    connection: Any
    plan: Plan
    target: Target
    relations: Sequence[Relation]

    @classmethod
    def of(cls, connection: Any, plan: Plan, found: Target) -> Self:
        """`plan` has no problems, so all of its tables are there."""
        relations = [found.find(table.schema, table.name) for table in plan.tables]
        return cls(connection, plan, found, [relation for relation in relations if relation is not None])

    async def replace(self, backup: Backup, meter: BackupMeter) -> tuple[dict[str, int], dict[str, int]]:
        """The rows of each table before and after."""
        keys = self.target.keys_of(self.relations)
        await self._free(keys)
        before = await count(self.connection, self.relations)
        if self.relations:
            await self._execute("TRUNCATE " + ", ".join(f"ONLY {relation.sql}" for relation in self.relations))
        meter.begin("restoring", sum(table.bytes for table in self.plan.tables))
        after = {}
        for table, relation in zip(self.plan.tables, self.relations, strict=True):
            after[str(table)] = await load(self.connection, backup, table, (relation.place, relation.name), meter)
        await self._execute("SET CONSTRAINTS ALL IMMEDIATE")
        for sequence in backup.sequences:
            await self._set(sequence)
        meter.begin("checking keys", 0)
        for key in keys:
            await self._add(key)
        await self._close()
        return before, after

    async def _execute(self, statement: str) -> None:
        await self.connection.execute(statement)

    async def _free(self, keys: Sequence[Key]) -> None:
        """Tables without keys between them, and without triggers or row security that would see the rows."""
        for key in keys:
            await self._execute(f"ALTER TABLE {self._sql(key.holder)} DROP CONSTRAINT {quoted(key.name)}")
        for relation in self.relations:
            await self._execute(f"ALTER TABLE {relation.sql} DISABLE TRIGGER USER")
            if relation.is_forced:
                await self._execute(f"ALTER TABLE {relation.sql} NO FORCE ROW LEVEL SECURITY")

    async def _add(self, key: Key) -> None:
        holder = self._sql(key.holder)
        try:
            await self._execute(f"ALTER TABLE {holder} ADD CONSTRAINT {quoted(key.name)} {key.text}")
        except asyncpg.ForeignKeyViolationError as error:
            if {key.holder, key.referred} <= self.target.with_parents(self.relations):
                raise DamagedBackup(
                    f"rows of {self.target.relations[key.holder]} in the backup {self.plan.backup} refer to rows of "
                    f"{self.target.relations[key.referred]} that are not in it: {server.cause_of(error)}. Nothing was "
                    "changed"
                ) from error
            raise BackupError(
                f"after the restore, rows of {self.target.relations[key.holder]} would refer to rows that are not "
                f"there, so nothing was changed: {server.cause_of(error)}"
            ) from error
        if key.comment is not None:
            comment = await self.connection.fetchval("SELECT pg_catalog.quote_literal($1::text)", key.comment)
            await self._execute(f"COMMENT ON CONSTRAINT {quoted(key.name)} ON {holder} IS {comment}")

    async def _set(self, saved: SavedSequence) -> None:
        """To the saved value, or past the rows. What follows ALTER SEQUENCE is undone with the transaction."""
        relation = self.target.find(saved.schema, saved.name)
        sequence = self.target.sequences.get(relation.id) if relation else None
        if relation is None or sequence is None or not self._is_ours(sequence.relation, relation):
            return
        value, called = saved.last_value, saved.is_called
        if sequence.relation is not None and sequence.column is not None and self._counts(sequence):
            farthest = "max" if sequence.step > 0 else "min"
            column, table = quoted(sequence.column), self._sql(sequence.relation)
            there = await self.connection.fetchval(f"SELECT {farthest}({column})::bigint FROM {table}")  # noqa: S608 (quoted)
            is_past = there is not None and (there - value) * sequence.step >= 0
            if is_past and sequence.least <= there <= sequence.most:
                value, called = there, True
        await self._execute(f"ALTER SEQUENCE {relation.sql} RESTART")
        await self.connection.execute("SELECT pg_catalog.setval($1::oid::regclass, $2, $3)", relation.id, value, called)

    def _counts(self, sequence: Counter) -> bool:
        """Whether the column holds the sequence's numbers, and not a text made of one."""
        columns = self.target.relations[sequence.relation].columns if sequence.relation else ()
        return any(column.name == sequence.column and column.type in INTEGERS for column in columns)

    def _is_ours(self, owner: int | None, sequence: Relation) -> bool:
        """Whether its table is restored. One of no table is, unless it is the ledger's."""
        if owner is None:
            return not is_ledgers(sequence.name)
        return owner in self.target.with_parents(self.relations)

    async def _close(self) -> None:
        ours = {relation.id: relation for relation in self.relations}
        for trigger in self.target.triggers:
            if trigger.relation in ours and (enable := ENABLE.get(trigger.state)):
                await self._execute(f"ALTER TABLE {ours[trigger.relation].sql} {enable} TRIGGER {quoted(trigger.name)}")
        for relation in self.relations:
            if relation.is_forced:
                await self._execute(f"ALTER TABLE {relation.sql} FORCE ROW LEVEL SECURITY")

    def _sql(self, number: int) -> str:
        return self.target.relations[number].sql
