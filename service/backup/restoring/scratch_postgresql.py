"""PostgreSQL: a restore into tables made for it, in schemas of their own and in one transaction, which is rolled back.

The tables are those of our migrations, at the backup's revision. What these don't make is made like the table of the
same name in the database. Names and types of the file are compared with what is there, and never used as SQL.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import asyncpg
from sqlalchemy.engine import URL

from service import clock
from service.backup.file.progress import BackupMeter
from service.backup.file.reader import Backup, SavedTable
from service.backup.file.selection import quoted
from service.backup.postgresql import server, target
from service.backup.postgresql.target import Counter, Key, Relation, Target
from service.backup.restoring import migrated
from service.backup.restoring import plan as plans
from service.backup.restoring.count import Report, compared
from service.backup.restoring.migrated import Needed
from service.backup.restoring.plan import Plan
from service.backup.restoring.restore_postgresql import INTEGERS, Work, revisions
from service.backup.restoring.revisions import of_backup
from service.concurrency.stoppable import Stop, in_own_loop
from service.database.migrate import History
from service.database.urls import safe_url
from service.errors import BackupError

LIKE = "INCLUDING ALL EXCLUDING COMMENTS EXCLUDING IDENTITY EXCLUDING STATISTICS"
MOST_NAMED = 5

TOUCHED = """
SELECT l.relation FROM pg_catalog.pg_locks l
WHERE l.pid = pg_catalog.pg_backend_pid() AND l.relation = ANY($1::oid[]) AND l.mode <> 'AccessShareLock' LIMIT 1
"""


def run(backup: Backup, place: URL, meter: BackupMeter, stop: Stop, histories: Sequence[History]) -> Report:
    with server.explained(place):
        return in_own_loop(_restore(backup, place, meter, histories), stop)


async def _restore(backup: Backup, place: URL, meter: BackupMeter, histories: Sequence[History]) -> Report:
    started, where = clock.monotonic(), f"a scratch schema in {safe_url(place)}, which was rolled back"
    async with server.connected(place) as connection:
        transaction = connection.transaction(isolation="read_committed")
        await transaction.start()
        try:
            scratch = await _made(connection, backup, place, histories)
            plan = await scratch.plan(place)
            await asyncio.to_thread(_read_others, backup, plan.tables)
            _, rows = await _Loading.of(connection, plan, scratch.target).replace(backup, meter)
            counted = compared(backup.source.name, plan.tables, {}, rows)
        finally:
            if not connection.is_closed():
                await transaction.rollback()
    return Report(backup.source.name, where, counted, clock.monotonic() - started, True, tuple(scratch.notes))


def _read_others(backup: Backup, loaded: Sequence[SavedTable]) -> None:
    """What is never restored (at which migration the tables were) is only compared with its checksums."""
    names = set(map(str, loaded))
    for table in backup.tables:
        if str(table) not in names:
            for _ in backup.parts(table):
                pass


class _Loading(Work):
    """A restore into tables that nobody will ever need again, so their rows are not logged."""

    async def _free(self, keys: Sequence[Key]) -> None:
        await super()._free(keys)
        if any(relation.kind == "p" for relation in self.target.relations.values()):
            return  # a partitioned table can't be unlogged, nor what it refers to
        for relation in self.relations:
            await self._execute(f"ALTER TABLE {relation.sql} SET UNLOGGED")


async def _made(connection: Any, backup: Backup, place: URL, histories: Sequence[History]) -> _Scratch:
    scratch = _Scratch(connection, backup, await target.look(connection), migrated.needed(backup, histories))
    await scratch.make_schemas(place)
    await scratch.migrate()
    await scratch.copy()
    return scratch


class _Scratch:
    """`live`: what is there already. `target`: the tables made for the backup, under the names that they stand for."""

    def __init__(self, connection: Any, backup: Backup, live: Target, wanted: Sequence[Needed]) -> None:
        self.connection = connection
        self.backup = backup
        self.live = live
        self.wanted = wanted
        self.tables = plans.restored(backup)
        self.notes: list[str] = []
        self.schemas: dict[str, str] = {}
        self.copies: list[Relation] = []

    async def make_schemas(self, place: URL) -> None:
        """One for each in which a table of the backup is."""
        saved = {table.schema for table in self.tables} | {sequence.schema for sequence in self.backup.sequences}
        there = {relation.schema for relation in self.live.relations.values()}
        mark = secrets.token_hex(8)
        for number, schema in enumerate(sorted({one.schema for one in self.wanted} | (there & saved)), 1):
            self.schemas[schema] = f"batch_scratch_{mark}_{number}"
        try:
            for name in self.schemas.values():
                await self.connection.execute(f"CREATE SCHEMA {quoted(name)}")
        except asyncpg.InsufficientPrivilegeError as error:
            raise BackupError(
                f"the role may not make a schema in {safe_url(place)}: GRANT CREATE ON DATABASE … TO it, or set "
                "RESTORE_DRILL_URL to an empty database where it may"
            ) from error

    async def migrate(self) -> None:
        """Make the tables of the migrations; those that the backup leaves out go again."""
        for needed in self.wanted:
            await migrated.make(self.connection, needed, self.schemas[needed.schema])
        touched = await self.connection.fetchval(TOUCHED, list(self.live.relations))
        if touched is not None:
            raise BackupError(
                f"the migrations up to {self.wanted[-1].revision} change {self.live.relations[touched]}, which is none "
                "of the tables that they make, so they were rolled back: set RESTORE_DRILL_URL to an empty database"
            )
        await self._look()
        ours = [one for table in self.tables if (one := self.target.find(table.schema, table.name))]
        kept = self.target.with_parents(ours)
        for key in self.target.keys:
            if key.holder in kept and key.referred not in kept:
                self._note(key, self.target)
        for other in self.target.relations.values():
            if other.kind in "rp" and other.id not in kept:
                await self.connection.execute(f"DROP TABLE IF EXISTS {other.sql} CASCADE")
        await self._look()

    async def copy(self) -> None:
        """What the migrations did not make, like the relations of the same names that are there."""
        for table in self.tables:
            original = self.live.find(table.schema, table.name)
            if original and original.kind == "r" and self.target.find(table.schema, table.name) is None:
                await self.connection.execute(
                    f"CREATE UNLOGGED TABLE {self._sql(original)} (LIKE {original.sql} {LIKE})"
                )
                self.copies.append(original)
        for sequence in self.backup.sequences:
            original = self.live.find(sequence.schema, sequence.name)
            if original and original.kind == "S" and self.target.find(sequence.schema, sequence.name) is None:
                await self._copy_sequence(original, self.live.sequences[original.id])
        await self._look()
        copied = self.live.with_parents(self.copies)
        for key in self.live.keys:
            if key.holder in copied:
                await self._copy_key(key)
        await self._look()

    async def _copy_sequence(self, original: Relation, counter: Counter) -> None:
        made = self._sql(original)
        await self.connection.execute(
            f"CREATE SEQUENCE {made} INCREMENT {counter.step} MINVALUE {counter.least} MAXVALUE {counter.most}"
        )
        owner = next((one for one in self.copies if one.id == counter.relation), None)
        column = next((one for one in owner.columns if one.name == counter.column), None) if owner else None
        if owner is None or column is None:
            return
        table, name = self._sql(owner), quoted(column.name)
        await self.connection.execute(f"ALTER SEQUENCE {made} OWNED BY {table}.{name}")
        if column.type in INTEGERS and not column.is_generated:
            literal = await self.connection.fetchval("SELECT pg_catalog.quote_literal($1::text)", made)
            await self.connection.execute(f"ALTER TABLE {table} ALTER {name} SET DEFAULT nextval({literal})")

    async def _copy_key(self, key: Key) -> None:
        """The server's own words for it, in which the other table is the one of that name in the search path."""
        holder, referred = self.live.relations[key.holder], self.live.relations[key.referred]
        if not all(self.target.find(one.schema, one.name) for one in (holder, referred)):
            self._note(key, self.live)
            return
        words = await self._in(referred.schema, "SELECT pg_catalog.pg_get_constraintdef($1::oid)", key.id)
        made = f"ALTER TABLE {self._sql(holder)} ADD CONSTRAINT {quoted(key.name)} {words}"
        await self._in(self.schemas[referred.schema], made)

    async def _in(self, schema: str, statement: str, *values: Any) -> Any:
        path = await self.connection.fetchval("SELECT pg_catalog.current_setting('search_path')")
        await self.connection.execute("SELECT pg_catalog.set_config('search_path', $1, true)", quoted(schema))
        result = await self.connection.fetchval(statement, *values)
        await self.connection.execute("SELECT pg_catalog.set_config('search_path', $1, true)", path)
        return result

    async def plan(self, place: URL) -> Plan:
        """Raises BackupError where there are tables that the backup can't be loaded into."""
        lacking = [str(table) for table in self.tables if self.target.find(table.schema, table.name) is None]
        if lacking:
            more = f" and {len(lacking) - MOST_NAMED:,} more" if len(lacking) > MOST_NAMED else ""
            raise BackupError(
                f"the backup {self.backup.source.name} can't be tried out as a whole, so nothing is said about it: "
                f"there is no table for the rows of {', '.join(lacking[:MOST_NAMED])}{more}. Neither the migrations "
                f"here make one, nor does {safe_url(place)} have one: let your own migrations make it there, and try "
                "again"
            )
        present = await revisions(self.connection, self.live) if self.copies else of_backup(self.backup)
        present = {**present, **{one.table: one.revision for one in self.wanted}}
        found = plans.for_postgresql(self.backup, place, self.target, present, {})
        found = replace(found, database=f"a scratch schema in {found.database}")
        found.refuse()
        return found

    async def _look(self) -> None:
        """As if each of the schemas were the one that it stands for, also in the names of types."""
        names = dict(await self.connection.fetch("SELECT nspname, pg_catalog.quote_ident(nspname) FROM pg_namespace"))
        stands_for = {place: schema for schema, place in self.schemas.items()}
        found = await target.look(self.connection)
        relations = {
            number: replace(
                relation,
                schema=stands_for[relation.place],
                columns=tuple(replace(one, type=_renamed(one.type, stands_for, names)) for one in relation.columns),
            )
            for number, relation in found.relations.items()
            if relation.place in stands_for
        }
        self.target = Target(
            relations,
            tuple(key for key in found.keys if key.holder in relations and key.referred in relations),
            tuple(trigger for trigger in found.triggers if trigger.relation in relations),
            {number: counter for number, counter in found.sequences.items() if number in relations},
            has_large_objects=False,
        )

    def _note(self, key: Key, found: Target) -> None:
        self.notes.append(f"the foreign key {key.name} of {found.relations[key.holder]} was not checked")

    def _sql(self, original: Relation) -> str:
        return quoted(self.schemas[original.schema], original.name)


def _renamed(type_name: str, stands_for: Mapping[str, str], names: Mapping[str, str]) -> str:
    """`names`: schemas as the server writes them."""
    for place, schema in stands_for.items():
        type_name = type_name.replace(f"{place}.", f"{names.get(schema, quoted(schema))}.")
    return type_name
