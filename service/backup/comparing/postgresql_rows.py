"""Compares a backup of a PostgreSQL database with the database, or with another backup, by COPY's own text.

The database is read as a backup reads it: one snapshot, the same settings, the same columns in the same order. So equal
rows are equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg

from service import clock
from service.backup.comparing.differences import Difference, Pair, Side, Table, pairs
from service.backup.comparing.tally import Counts, Keyed, Keyless, Pace, Tally, UnfitRow, cut, lines, whole_rows
from service.backup.file.format import POSTGRESQL
from service.backup.file.reader import Backup
from service.backup.file.selection import Selection, is_ledgers, quoted
from service.backup.postgresql import snapshot
from service.backup.postgresql.relations import Relation
from service.concurrency.stoppable import Stop, in_own_loop
from service.errors import BackupError
from service.escaping import brief

PART_BYTES = 512 * 1024


@dataclass(frozen=True)
class Database:
    """The application's. `arguments` are the connection's, with the password; `shown` is for messages, without it.

    `setting` names it.
    """

    name: str
    shown: str
    setting: str
    arguments: dict[str, Any]
    selection: Selection


class _Saved:
    """The rows of a backup's tables."""

    def __init__(self, backup: Backup) -> None:
        self._backup = backup
        self._tables = {(table.schema, table.name): table for table in backup.tables}

    def count(self, table: Table | None) -> int:
        return self._tables[table.schema, table.name].rows if table else 0

    def rows(self, table: Table | None, wanted: Iterable[str]) -> Iterator[list[bytes]]:
        """Of each row the wanted columns."""
        if table is None:
            return
        saved = self._tables[table.schema, table.name]
        cut_rows = cut(saved.columns, tuple(wanted))
        yield from map(cut_rows, whole_rows(self._backup.parts(saved)))


def between(old: Backup, new: Backup, before: Side, after: Side, stop: Stop) -> Difference:
    counted, was, now = [], _Saved(old), _Saved(new)
    for pair in pairs(before, after):
        if (known := _of_one_side(pair, was.count(pair.before), now.count(pair.after))) is not None:
            counted.append((pair, known))
            continue
        with _tallied(pair, stop) as tally:
            pace = Pace(tally, was.rows(pair.before, pair.shared), stop)
            for rows in now.rows(pair.after, pair.shared):
                pace.after(rows)
            counted.append((pair, pace.end()))
    return Difference.of(before, after, counted)


def with_database(old: Backup, before: Side, database: Database, stop: Stop) -> Difference:
    with _explained(database):
        return in_own_loop(_with_database(old, before, database, stop), stop)


async def _with_database(old: Backup, before: Side, database: Database, stop: Stop) -> Difference:
    has_ledger = any(is_ledgers(table.name) for table in old.tables)
    selection = Selection(database.selection.include, database.selection.exclude, ledger=has_ledger)
    async with snapshot.connected(database.arguments, setting=database.setting) as connection:
        contents = await snapshot.take(connection, selection)
        facts = await snapshot.facts(connection, contents)
        after = Side(
            name=f"the database {database.shown}",
            taken_at=clock.now(),
            kind=POSTGRESQL,
            database=database.name,
            revision=facts["revision"],
            revisions=facts["revisions"],
            tables=tuple(map(_table, contents.tables)),
            left_out=frozenset(contents.left_out),
        )
        was = _Saved(old)
        counted = [(pair, await _count(connection, was, pair, stop)) for pair in pairs(before, after)]
    return Difference.of(before, after, counted)


def _table(relation: Relation) -> Table:
    return Table(relation.schema, relation.name, relation.names, relation.types, relation.key)


async def _count(connection: Any, was: _Saved, pair: Pair, stop: Stop) -> Counts:
    stop.check()
    rows = await _rows_now(connection, pair.after) if pair.before is None or not pair.shared else 0
    if (known := _of_one_side(pair, was.count(pair.before), rows)) is not None:
        return known
    assert pair.after is not None
    with _tallied(pair, stop) as tally:
        pace = Pace(tally, was.rows(pair.before, pair.shared), stop)
        gathered = _Gathered(pace)
        await connection.copy_from_table(
            pair.after.name, schema_name=pair.after.schema, columns=pair.shared, output=gathered.receive
        )
        gathered.flush()
        return pace.end()


@dataclass
class _Gathered:
    """What the server sends, in parts of whole rows: each row comes as one message."""

    pace: Pace

    def __post_init__(self) -> None:
        self._data = bytearray()

    async def receive(self, data: bytes) -> None:
        self._data += data
        if len(self._data) >= PART_BYTES:
            self.flush()

    def flush(self) -> None:
        part = bytes(self._data)
        self._data.clear()
        self.pace.after(lines(part))


async def _rows_now(connection: Any, table: Table | None) -> int:
    if table is None:
        return 0
    name = quoted(table.schema or "", table.name)
    return int(await connection.fetchval(f"SELECT count(*) FROM ONLY {name}"))  # noqa: S608 (names are quoted)


def _of_one_side(pair: Pair, before: int, after: int) -> Counts | None:
    """What is known without a look at the rows, of which one side has none, or nothing that could be compared."""
    if pair.before is None or pair.after is None:
        return Counts(before, after, added=after, removed=before, changed=0, same=False)
    if not pair.shared:
        return Counts(before, after, None, None, None, same=before == after == 0)
    return None


@contextmanager
def _tallied(pair: Pair, stop: Stop) -> Iterator[Tally]:
    made = Keyed([pair.shared.index(name) for name in pair.key], stop) if pair.key else Keyless()
    try:
        with closing(made) as tally:
            yield tally
    except UnfitRow as error:
        raise BackupError(f"{brief(pair.name)} can't be compared: {error}") from error


@contextmanager
def _explained(database: Database) -> Iterator[None]:
    try:
        yield
    except asyncpg.LockNotAvailableError as error:
        raise BackupError(
            f"the database {database.shown} could not be compared: something holds a table, a migration perhaps. Try "
            "again when it is over."
        ) from error
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise BackupError(
            f"the database {database.shown} could not be compared: {cause}. Look at {database.setting} and the server."
        ) from error
