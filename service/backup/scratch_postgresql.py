"""PostgreSQL: tables like those of a backup, filled from it, keys and all, in a transaction that is rolled back."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import asyncpg
from sqlalchemy.engine import URL

from service import clock
from service.backup import server, target
from service.backup.count import Report, compared
from service.backup.create import shown
from service.backup.format import POSTGRESQL
from service.backup.loading import load
from service.backup.plan import other_revisions, shape_problems
from service.backup.progress import Meter
from service.backup.reader import Backup, SavedTable
from service.backup.restore_postgresql import revisions
from service.backup.selection import quoted
from service.backup.target import Key, Relation, Target
from service.backup.threads import Stop, in_own_loop
from service.errors import BackupError, DamagedBackup

LIKE = "INCLUDING ALL EXCLUDING COMMENTS EXCLUDING STATISTICS"
MATCH_FULL = " MATCH FULL"
PERIOD = ", PERIOD "
OTHER_MIGRATION = "the database is at another migration than the backup: only types and primary keys were checked"


def run(backup: Backup, application: URL, drill: URL | None, meter: Meter, stop: Stop) -> Report:
    with server.explained(drill or application):
        return in_own_loop(_restore(backup, application, drill, meter), stop)


async def _restore(backup: Backup, application: URL, drill: URL | None, meter: Meter) -> Report:
    started, place = clock.monotonic(), drill or application
    async with server.connected(place) as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            scratch = await _schema(connection, place)
            found, now = await _looked(connection) if drill is None else await _looked_elsewhere(application)
            made = _Scratch(connection, scratch, found, drill is None, not other_revisions(backup, now))
            rows = await made.fill(backup, meter)
        finally:
            if not connection.is_closed():
                await transaction.rollback()
    counted = compared(backup.source.name, backup.tables, {}, rows)
    where = f"a scratch schema in {shown(place)}, which was rolled back"
    return Report(backup.source.name, where, counted, clock.monotonic() - started, True, tuple(made.notes))


async def _schema(connection: Any, place: URL) -> str:
    name = f"batch_scratch_{secrets.token_hex(8)}"
    try:
        await connection.execute(f"CREATE SCHEMA {name}")
    except asyncpg.InsufficientPrivilegeError as error:
        raise BackupError(
            f"the role may not make a schema in {shown(place)}: GRANT CREATE ON DATABASE … TO it, or set "
            "RESTORE_DRILL_URL to an empty database where it may"
        ) from error
    return name


async def _looked(connection: Any) -> tuple[Target, dict[str, str]]:
    """The present tables of the application, and at which migrations they are."""
    found = await target.look(connection)
    return found, await revisions(connection, found)


async def _looked_elsewhere(application: URL) -> tuple[Target, dict[str, str]]:
    """For the keys between them. There are none where the application is on SQLite by now."""
    if application.get_backend_name() != POSTGRESQL:
        return Target({}, (), (), {}, False), {}
    async with server.connected(application) as connection:
        return await _looked(connection)


@dataclass(frozen=True)
class _Made:
    """A scratch table: which saved one it stands for, and of which present one it is a copy."""

    saved: SavedTable
    name: str
    original: Relation | None
    is_like: bool


class _Scratch:
    """`is_same`: the present tables are at the backup's migration, so that its rows must fit into them."""

    def __init__(self, connection: Any, schema: str, found: Target, is_beside: bool, is_same: bool) -> None:
        self.connection = connection
        self.schema = schema
        self.target = found
        self.is_beside = is_beside
        self.is_same = is_same
        self.notes: list[str] = [] if is_same else [OTHER_MIGRATION]

    async def fill(self, backup: Backup, meter: Meter) -> Mapping[str, int]:
        """How many rows each table then has."""
        made = [await self._make(table, number) for number, table in enumerate(backup.tables, 1)]
        meter.begin("restoring", sum(table.bytes for table in backup.tables))
        rows = {}
        for one in made:
            await load(self.connection, backup, one.saved, (self.schema, one.name), meter)
            rows[str(one.saved)] = await self.connection.fetchval(f"SELECT count(*) FROM {self._sql(one)}")  # noqa: S608
        await self.connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
        meter.begin("checking keys", 0)
        for key in self.target.keys if self.is_same else ():
            for holder in made:
                if holder.original and key.is_valid and key.holder in self.target.with_parents([holder.original]):
                    await self._check(key, holder, made)
        return rows

    async def _make(self, table: SavedTable, number: int) -> _Made:
        original = self.target.find(table.schema, table.name)
        can_be_like = self.is_beside and self.is_same
        is_like = can_be_like and original is not None and not shape_problems(table, original)
        made = _Made(table, f"t{number:04}", original, is_like)
        if is_like and original is not None:
            columns = f"LIKE {original.sql} {LIKE}"
        else:
            columns = ", ".join([*await self._columns(table), *self._primary_key(table)])
            if can_be_like:
                self.notes.append(
                    f"{table} looks otherwise in the database now: only types and primary key were checked"
                )
        await self.connection.execute(f"CREATE UNLOGGED TABLE {self._sql(made)} ({columns})")
        return made

    async def _columns(self, table: SavedTable) -> list[str]:
        """A type that is not there, an enum of another database say, is text."""
        found = []
        for name, kind in zip(table.columns, table.types, strict=True):
            is_known = await self.connection.fetchval("SELECT pg_catalog.to_regtype($1) IS NOT NULL", kind)
            found.append(f"{quoted(name)} {kind if is_known else 'text'}")
        return found

    def _primary_key(self, table: SavedTable) -> list[str]:
        is_whole = table.key and set(table.key) <= set(table.columns)
        return [f"PRIMARY KEY ({', '.join(map(quoted, table.key))})"] if is_whole else []

    async def _check(self, key: Key, holder: _Made, made: list[_Made]) -> None:
        """Add the key, which looks at every row."""
        referred = next((one for one in made if one.original and one.original.id == key.referred), None)
        has_all = referred is not None and _has(holder, key.columns) and _has(referred, key.referred_columns)
        if referred is None or not has_all or PERIOD in key.text:
            self.notes.append(f"the foreign key {key.name} of {holder.saved} was not checked")
            return
        ends = [", ".join(map(quoted, names)) for names in (key.columns, key.referred_columns)]
        if not referred.is_like and set(referred.saved.key) != set(key.referred_columns):
            await self.connection.execute(f"ALTER TABLE {self._sql(referred)} ADD UNIQUE ({ends[1]})")
        match = MATCH_FULL if MATCH_FULL in key.text else ""
        try:
            await self.connection.execute(
                f"ALTER TABLE {self._sql(holder)} ADD FOREIGN KEY ({ends[0]}) "
                f"REFERENCES {self._sql(referred)} ({ends[1]}){match}"
            )
        except asyncpg.ForeignKeyViolationError as error:
            raise DamagedBackup(
                f"rows of {holder.saved} in the backup refer to rows of {referred.saved} that are not in it: "
                f"{server.cause_of(error)}"
            ) from error

    def _sql(self, made: _Made) -> str:
        return quoted(self.schema, made.name)


def _has(made: _Made, columns: tuple[str, ...]) -> bool:
    return made.is_like or set(columns) <= set(made.saved.columns)
