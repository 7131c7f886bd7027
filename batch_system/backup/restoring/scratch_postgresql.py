"""Tries out a restore on PostgreSQL: into new tables in schemas of their own, in a transaction that
is rolled back.

The tables are made by the service's migrations at the backup's revision. Other tables are made like
those of the same name in the database. Names and types in the backup are compared with those in the
database, and never used as SQL.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import asyncpg
from sqlalchemy.engine import URL

from batch_system import clock
from batch_system.backup.file.progress import BackupMeter
from batch_system.backup.file.reader import Backup, SavedTable
from batch_system.backup.file.selection import quoted
from batch_system.backup.postgresql import server, target
from batch_system.backup.postgresql.target import ForeignKey, Target, TargetRelation, TargetSequence
from batch_system.backup.restoring import migrated
from batch_system.backup.restoring import plan as plans
from batch_system.backup.restoring.count import RestoreReport, checked_counts
from batch_system.backup.restoring.migrated import NeededRevision
from batch_system.backup.restoring.plan import RestorePlan
from batch_system.backup.restoring.restore_postgresql import INTEGERS, PostgresqlRestore, revisions
from batch_system.concurrency.stoppable import Stop, in_own_loop
from batch_system.database.migrate import History
from batch_system.database.urls import safe_url
from batch_system.errors import BackupError

LIKE = "INCLUDING ALL EXCLUDING COMMENTS EXCLUDING IDENTITY EXCLUDING STATISTICS"
MOST_NAMED = 5

TOUCHED = """
SELECT l.relation FROM pg_catalog.pg_locks l
WHERE l.pid = pg_catalog.pg_backend_pid()
  AND l.relation = ANY($1::oid[])
  AND l.mode <> 'AccessShareLock'
LIMIT 1
"""


def run(
    backup: Backup, place: URL, meter: BackupMeter, stop: Stop, histories: Sequence[History]
) -> RestoreReport:
    """Restore into scratch schemas of the database `place`, and roll back. Raises BackupError and
    Stopped.
    """
    with server.explained(place):
        return in_own_loop(_restore(backup, place, meter, histories), stop)


async def _restore(
    backup: Backup, place: URL, meter: BackupMeter, histories: Sequence[History]
) -> RestoreReport:
    started, where = (
        clock.monotonic(),
        f"a scratch schema in {safe_url(place)}, which was rolled back",
    )
    async with server.connected(place) as connection:
        transaction = connection.transaction(isolation="read_committed")
        await transaction.start()
        try:
            scratch = await _made_scratch(connection, backup, place, histories)
            plan = await scratch.plan(place)
            await asyncio.to_thread(_read_unloaded, backup, plan.tables)
            _, rows = await _ScratchRestore.of(connection, plan, scratch.target).replace(
                backup, meter
            )
            counts = checked_counts(backup.source.name, plan.tables, {}, rows)
        finally:
            if not connection.is_closed():
                await transaction.rollback()
    return RestoreReport(
        backup.source.name, where, counts, clock.monotonic() - started, True, tuple(scratch.notes)
    )


def _read_unloaded(backup: Backup, loaded: Sequence[SavedTable]) -> None:
    """Compare the tables that are never restored, such as version tables, with their checksums."""
    names = set(map(str, loaded))
    for table in backup.tables:
        if str(table) not in names:
            for _ in backup.parts(table):
                pass


class _ScratchRestore(PostgresqlRestore):
    """A restore into unlogged tables, because they are rolled back in any case."""

    async def _disable_checks(self, keys: Sequence[ForeignKey]) -> None:
        await super()._disable_checks(keys)
        if any(relation.kind == "p" for relation in self.target.relations.values()):
            return  # neither a partitioned table nor a table that it refers to can be unlogged
        for relation in self.relations:
            await self._execute(f"ALTER TABLE {relation.sql} SET UNLOGGED")


async def _made_scratch(
    connection: Any, backup: Backup, place: URL, histories: Sequence[History]
) -> _Scratch:
    live = await target.read_target(connection)
    scratch = _Scratch(connection, backup, live, migrated.needed_revisions(backup, histories))
    await scratch.make_schemas(place)
    await scratch.migrate()
    await scratch.copy()
    return scratch


class _Scratch:
    """Scratch schemas with tables for a backup.

    `live`: the tables of the database. `target`: the tables made for the backup, as if they were in
    the schemas that theirs stand for. `schemas`: the scratch schemas by the schemas that they stand
    for.
    """

    def __init__(
        self, connection: Any, backup: Backup, live: Target, needed: Sequence[NeededRevision]
    ) -> None:
        self.connection = connection
        self.backup = backup
        self.live = live
        self.needed = needed
        self.tables = plans.restored_tables(backup)
        self.notes: list[str] = []
        self.schemas: dict[str, str] = {}
        self.copies: list[TargetRelation] = []

    async def make_schemas(self, place: URL) -> None:
        """Make a scratch schema for each schema that has a table of the backup. Raises
        BackupError.
        """
        saved = {table.schema for table in self.tables} | {
            sequence.schema for sequence in self.backup.sequences
        }
        present = {relation.schema for relation in self.live.relations.values()}
        migrated_schemas = {revision.schema for revision in self.needed}
        suffix = secrets.token_hex(8)
        for number, schema in enumerate(sorted(migrated_schemas | (present & saved)), 1):
            self.schemas[schema] = f"batch_scratch_{suffix}_{number}"
        try:
            for name in self.schemas.values():
                await self.connection.execute(f"CREATE SCHEMA {quoted(name)}")
        except asyncpg.InsufficientPrivilegeError as error:
            raise BackupError(
                f"the role may not make a schema in {safe_url(place)}: GRANT CREATE ON DATABASE "
                "… TO the role, or "
                "set RESTORE_DRILL_URL to an empty database where it may"
            ) from error

    async def migrate(self) -> None:
        """Make the tables of the migrations, and drop those that the backup lacks. Raises
        BackupError.
        """
        for revision in self.needed:
            await migrated.make(self.connection, revision, self.schemas[revision.schema])
        touched = await self.connection.fetchval(TOUCHED, list(self.live.relations))
        if touched is not None:
            raise BackupError(
                f"the migrations up to {self.needed[-1].revision} change "
                f"{self.live.relations[touched]}, which they have not made, so they were rolled "
                "back: set RESTORE_DRILL_URL to an empty database"
            )
        await self._read_target()
        tables = [self.target.find(table.schema, table.name) for table in self.tables]
        kept = self.target.with_parents([relation for relation in tables if relation is not None])
        for key in self.target.keys:
            if key.holder in kept and key.referred not in kept:
                self._note_unchecked(key, self.target)
        for relation in self.target.relations.values():
            if relation.kind in "rp" and relation.id not in kept:
                await self.connection.execute(f"DROP TABLE IF EXISTS {relation.sql} CASCADE")
        await self._read_target()

    async def copy(self) -> None:
        """Make the relations that the migrations did not make, like those of the same names in the
        database.
        """
        for table in self.tables:
            original = self.live.find(table.schema, table.name)
            if (
                original
                and original.kind == "r"
                and self.target.find(table.schema, table.name) is None
            ):
                await self.connection.execute(
                    f"CREATE UNLOGGED TABLE {self._sql(original)} (LIKE {original.sql} {LIKE})"
                )
                self.copies.append(original)
        for sequence in self.backup.sequences:
            original = self.live.find(sequence.schema, sequence.name)
            if (
                original
                and original.kind == "S"
                and self.target.find(sequence.schema, sequence.name) is None
            ):
                await self._copy_sequence(original, self.live.sequences[original.id])
        await self._read_target()
        copied = self.live.with_parents(self.copies)
        for key in self.live.keys:
            if key.holder in copied:
                await self._copy_key(key)
        await self._read_target()

    async def _copy_sequence(self, original: TargetRelation, sequence: TargetSequence) -> None:
        copy = self._sql(original)
        await self.connection.execute(
            f"CREATE SEQUENCE {copy} INCREMENT {sequence.step} MINVALUE {sequence.least} "
            f"MAXVALUE {sequence.most}"
        )
        owner = next(
            (relation for relation in self.copies if relation.id == sequence.relation), None
        )
        columns = owner.columns if owner else ()
        column = next((column for column in columns if column.name == sequence.column), None)
        if owner is None or column is None:
            return
        table, name = self._sql(owner), quoted(column.name)
        await self.connection.execute(f"ALTER SEQUENCE {copy} OWNED BY {table}.{name}")
        if column.type in INTEGERS and not column.is_generated:
            literal = await self.connection.fetchval(
                "SELECT pg_catalog.quote_literal($1::text)", copy
            )
            await self.connection.execute(
                f"ALTER TABLE {table} ALTER {name} SET DEFAULT nextval({literal})"
            )

    async def _copy_key(self, key: ForeignKey) -> None:
        """Copy a foreign key by the server's own definition of it.

        In the definition the table that it refers to has no schema, so the search path decides
        which table is meant.
        """
        holder, referred = self.live.relations[key.holder], self.live.relations[key.referred]
        if not all(
            self.target.find(relation.schema, relation.name) for relation in (holder, referred)
        ):
            self._note_unchecked(key, self.live)
            return
        query = "SELECT pg_catalog.pg_get_constraintdef($1::oid)"
        definition = await self._fetch_in(referred.schema, query, key.id)
        statement = (
            f"ALTER TABLE {self._sql(holder)} ADD CONSTRAINT {quoted(key.name)} {definition}"
        )
        await self._fetch_in(self.schemas[referred.schema], statement)

    async def _fetch_in(self, schema: str, statement: str, *values: Any) -> Any:
        """Execute a statement with `schema` as the search path, and return the first value of its
        result.
        """
        path = await self.connection.fetchval("SELECT pg_catalog.current_setting('search_path')")
        await self.connection.execute(
            "SELECT pg_catalog.set_config('search_path', $1, true)", quoted(schema)
        )
        result = await self.connection.fetchval(statement, *values)
        await self.connection.execute("SELECT pg_catalog.set_config('search_path', $1, true)", path)
        return result

    async def plan(self, place: URL) -> RestorePlan:
        """Plan the restore into the scratch schemas. Raises BackupError if a table is missing or
        does not fit.
        """
        lacking = [
            str(table)
            for table in self.tables
            if self.target.find(table.schema, table.name) is None
        ]
        if lacking:
            more = f" and {len(lacking) - MOST_NAMED:,} more" if len(lacking) > MOST_NAMED else ""
            raise BackupError(
                f"the backup {self.backup.source.name} can't be tried out as a whole, so it was "
                "not checked: there is no table for the rows of "
                f"{', '.join(lacking[:MOST_NAMED])}{more}. Neither the service's migrations nor "
                f"{safe_url(place)} have one: let your own migrations make it there, and try again"
            )
        present = (
            await revisions(self.connection, self.live)
            if self.copies
            else self.backup.header.revisions
        )
        present = {**present, **{revision.table: revision.revision for revision in self.needed}}
        plan = plans.for_postgresql(self.backup, place, self.target, present, {})
        plan = replace(plan, database=f"a scratch schema in {plan.database}")
        plan.refuse()
        return plan

    async def _read_target(self) -> None:
        """Set `target` from the database, with each scratch schema renamed to the schema that it
        stands for.

        Names of types are renamed too.
        """
        names = dict(
            await self.connection.fetch(
                "SELECT nspname, pg_catalog.quote_ident(nspname) FROM pg_namespace"
            )
        )
        stands_for = {place: schema for schema, place in self.schemas.items()}
        database = await target.read_target(self.connection)
        relations = {
            number: replace(
                relation,
                schema=stands_for[relation.place],
                columns=tuple(
                    replace(c, type=_renamed(c.type, stands_for, names)) for c in relation.columns
                ),
            )
            for number, relation in database.relations.items()
            if relation.place in stands_for
        }
        self.target = Target(
            relations,
            tuple(
                key
                for key in database.keys
                if key.holder in relations and key.referred in relations
            ),
            tuple(trigger for trigger in database.triggers if trigger.relation in relations),
            {
                number: sequence
                for number, sequence in database.sequences.items()
                if number in relations
            },
            has_large_objects=False,
        )

    def _note_unchecked(self, key: ForeignKey, database: Target) -> None:
        self.notes.append(
            f"the foreign key {key.name} of {database.relations[key.holder]} was not checked"
        )

    def _sql(self, original: TargetRelation) -> str:
        """The name of the copy of a relation, quoted for SQL."""
        return quoted(self.schemas[original.schema], original.name)


def _renamed(type_name: str, stands_for: Mapping[str, str], names: Mapping[str, str]) -> str:
    """Replace scratch schemas in the name of a type; `names`: the names of schemas, quoted as the
    server does it.
    """
    for place, schema in stands_for.items():
        type_name = type_name.replace(f"{place}.", f"{names.get(schema, quoted(schema))}.")
    return type_name
