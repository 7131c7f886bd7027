"""Compares a backup of a PostgreSQL database with the database, or with another backup, by the text
format of COPY.

The database is read as for a backup: in one snapshot, with the same settings, and with the same
columns in the same order. So equal rows have equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg

from batch_system import clock
from batch_system.backup.comparing.differences import Difference, Pair, Side, Table, pairs
from batch_system.backup.comparing.tally import (
    Counts,
    Keyed,
    Keyless,
    Pace,
    Tally,
    UnfitRow,
    cut,
    lines,
    whole_rows,
)
from batch_system.backup.file.format import POSTGRESQL
from batch_system.backup.file.reader import Backup
from batch_system.backup.file.selection import Selection, is_ledgers, quoted
from batch_system.backup.postgresql import snapshot
from batch_system.backup.postgresql.relations import SourceRelation
from batch_system.concurrency.stoppable import Stop, in_own_loop
from batch_system.errors import BackupError
from batch_system.escaping import brief

PART_BYTES = 512 * 1024


@dataclass(frozen=True)
class CurrentDatabase:
    """The application's database.

    `arguments`: those of the connection, with the password. `safe_url`: the URL without the
    password, for messages. `setting`: the setting that holds the URL.
    """

    name: str
    safe_url: str
    setting: str
    arguments: dict[str, Any]
    selection: Selection


class _SavedRows:
    """The rows of the tables in a backup."""

    def __init__(self, backup: Backup) -> None:
        self._backup = backup
        self._tables = {(table.schema, table.name): table for table in backup.tables}

    def count(self, table: Table | None) -> int:
        return self._tables[table.schema, table.name].rows if table else 0

    def rows(self, table: Table | None, columns: Iterable[str]) -> Iterator[list[bytes]]:
        """The rows with these columns, in groups."""
        if table is None:
            return
        saved = self._tables[table.schema, table.name]
        cut_rows = cut(saved.columns, tuple(columns))
        yield from map(cut_rows, whole_rows(self._backup.parts(saved)))


def between(old: Backup, new: Backup, before: Side, after: Side, stop: Stop) -> Difference:
    """Compare two backups. Raises BackupError."""
    counts, old_rows, new_rows = [], _SavedRows(old), _SavedRows(new)
    for pair in pairs(before, after):
        known = _counts_without_rows(pair, old_rows.count(pair.before), new_rows.count(pair.after))
        if known is not None:
            counts.append((pair, known))
            continue
        with _tallied(pair, stop) as tally:
            pace = Pace(tally, old_rows.rows(pair.before, pair.shared), stop)
            for rows in new_rows.rows(pair.after, pair.shared):
                pace.after(rows)
            counts.append((pair, pace.end()))
    return Difference.of(before, after, counts)


def with_database(old: Backup, before: Side, database: CurrentDatabase, stop: Stop) -> Difference:
    """Compare a backup with the current database. Raises BackupError."""
    with _explained(database):
        return in_own_loop(_with_database(old, before, database, stop), stop)


async def _with_database(
    old: Backup, before: Side, database: CurrentDatabase, stop: Stop
) -> Difference:
    has_ledger = any(is_ledgers(table.name) for table in old.tables)
    selection = Selection(database.selection.include, database.selection.exclude, ledger=has_ledger)
    async with snapshot.connected(database.arguments, setting=database.setting) as connection:
        contents = await snapshot.take(connection, selection)
        facts = await snapshot.facts(connection, contents)
        after = Side(
            name=f"the database {database.safe_url}",
            taken_at=clock.now(),
            kind=POSTGRESQL,
            database=database.name,
            revision=facts["revision"],
            revisions=facts["revisions"],
            tables=tuple(map(_table, contents.tables)),
            left_out=frozenset(contents.left_out),
        )
        old_rows = _SavedRows(old)
        counts = [
            (pair, await _count(connection, old_rows, pair, stop)) for pair in pairs(before, after)
        ]
    return Difference.of(before, after, counts)


def _table(relation: SourceRelation) -> Table:
    return Table(relation.schema, relation.name, relation.names, relation.types, relation.key)


async def _count(connection: Any, old_rows: _SavedRows, pair: Pair, stop: Stop) -> Counts:
    stop.check()
    rows = (
        await _count_current(connection, pair.after)
        if pair.before is None or not pair.shared
        else 0
    )
    if (known := _counts_without_rows(pair, old_rows.count(pair.before), rows)) is not None:
        return known
    assert pair.after is not None
    with _tallied(pair, stop) as tally:
        pace = Pace(tally, old_rows.rows(pair.before, pair.shared), stop)
        receiver = _Receiver(pace)
        await connection.copy_from_table(
            pair.after.name,
            schema_name=pair.after.schema,
            columns=pair.shared,
            output=receiver.receive,
        )
        receiver.flush()
        return pace.end()


@dataclass
class _Receiver:
    """Gathers the rows that the server sends into parts. Each row comes in one message, so parts
    hold whole rows.
    """

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


async def _count_current(connection: Any, table: Table | None) -> int:
    """The number of rows of a table in the current database; 0 for None."""
    if table is None:
        return 0
    name = quoted(table.schema or "", table.name)
    return int(await connection.fetchval(f"SELECT count(*) FROM ONLY {name}"))


def _counts_without_rows(pair: Pair, before: int, after: int) -> Counts | None:
    """The counts of a table that one side lacks, or without shared columns; None if its rows must
    be compared.
    """
    if pair.before is None or pair.after is None:
        return Counts(before, after, added=after, removed=before, changed=0, same=False)
    if not pair.shared:
        return Counts(before, after, None, None, None, same=before == after == 0)
    return None


@contextmanager
def _tallied(pair: Pair, stop: Stop) -> Iterator[Tally]:
    tally = Keyed([pair.shared.index(name) for name in pair.key], stop) if pair.key else Keyless()
    try:
        with closing(tally):
            yield tally
    except UnfitRow as error:
        raise BackupError(f"{brief(pair.name)} can't be compared: {error}") from error


@contextmanager
def _explained(database: CurrentDatabase) -> Iterator[None]:
    """Turn an error of the server or of the network in the block into a BackupError with advice."""
    try:
        yield
    except asyncpg.LockNotAvailableError as error:
        raise BackupError(
            f"the database {database.safe_url} could not be compared: something holds the lock of "
            "a table, a migration perhaps. Try again when it is over."
        ) from error
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise BackupError(
            f"the database {database.safe_url} could not be compared: {cause}. Look at "
            f"{database.setting} and the server."
        ) from error
