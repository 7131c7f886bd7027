"""Counts the rows that differ between two streams of rows, whatever the order of the rows, in flat
memory.

Rows are bytes in the text format of COPY; within one side, all rows differ. A row waits until the
other side has the equal row, and then both are dropped. When too many rows are waiting, their
hashes are written into a temporary file of SQLite. The file has no name, so it is removed when its
process ends. At the end, SQLite sorts it by key.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import blake2b

from batch_system.concurrency.stoppable import Stop
from batch_system.errors import BackupError

BEFORE, AFTER = 0, 1
WAITING_BYTES = 12 * 1024 * 1024
LARGEST_ROW = 32 * 1024 * 1024
"""Largest row of a backup in bytes: a row is compared as a whole, so it must be in memory."""
ROW_OVERHEAD = 120
"""Bytes of memory that Python needs for a row in a set, in addition to the bytes of the row."""
CACHE_KILOBYTES = 8_000
DIGEST_BYTES = 16
CHECK_EVERY_INSTRUCTIONS = 100_000

PREPARE = f"""
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA temp_store = FILE;
PRAGMA cache_size = -{CACHE_KILOBYTES};
CREATE TABLE spilled (key BLOB, side INTEGER, row BLOB);
BEGIN;
"""
COUNT = """
SELECT coalesce(sum(before = 0), 0),
    coalesce(sum(after = 0), 0),
    coalesce(sum(before AND after AND NOT same), 0)
FROM (
    SELECT sum(side = 0) AS before, sum(side = 1) AS after, min(row) = max(row) AS same
    FROM spilled
    GROUP BY key
)
"""


class UnfitRow(Exception):
    """A row can't be compared. The message says why."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of rows. `before`, `after`: those of each side. `same`: whether no row differs.

    `added`, `removed`: rows that only one side has. `changed`: rows whose other values differ
    between the sides. These three are None for a table without a key.
    """

    before: int
    after: int
    added: int | None
    removed: int | None
    changed: int | None
    same: bool


class Keyed:
    """Compares rows with a key. `key`: the positions of its columns in the row."""

    def __init__(self, key: Sequence[int], stop: Stop) -> None:
        self._key_of = _key_of(key)
        self._stop = stop
        self._rows = [0, 0]
        self._waiting: tuple[set[bytes], set[bytes]] = (set(), set())
        self._size = self._changed = 0
        self._file: sqlite3.Connection | None = None

    def add(self, side: int, rows: Sequence[bytes]) -> None:
        self._rows[side] += len(rows)
        new = set(rows)
        other = self._waiting[1 - side]
        equal = new & other
        other -= equal
        new -= equal
        self._size += _size(new) - _size(equal)
        self._waiting[side].update(new)
        if self._size > WAITING_BYTES:
            self._spill()

    def counts(self) -> Counts:
        """The counts, after all rows of both sides were added."""
        self._spill()
        with _explained(self._stop), closing(self._opened()) as file:
            added, removed, changed = file.execute(COUNT).fetchone()
        self._file = None
        changed += self._changed
        before, after = self._rows
        return Counts(
            before, after, added, removed, changed, same=not (added or removed or changed)
        )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _spill(self) -> None:
        """Empty the memory: count the waiting rows whose key both sides have, and write the others
        into the file.

        Rows with the same key differ in other columns, because equal rows have been dropped
        already.
        """
        before, after = ({self._key_of(row): row for row in rows} for rows in self._waiting)
        common = before.keys() & after.keys()
        self._changed += len(common)
        with _explained(self._stop):
            for side, rows in enumerate((before, after)):
                others = ((key, side, rows[key]) for key in rows.keys() - common)
                self._opened().executemany(
                    "INSERT INTO spilled VALUES (?, ?, ?)", map(_hashed, others)
                )
        for waiting in self._waiting:
            waiting.clear()
        self._size = 0

    def _opened(self) -> sqlite3.Connection:
        if self._file is None:
            self._file = sqlite3.connect("", isolation_level=None)
            self._file.executescript(PREPARE)
            self._file.set_progress_handler(self._stop.is_requested, CHECK_EVERY_INSTRUCTIONS)
        return self._file


class Keyless:
    """Compares rows without a key, which may be repeated. It only tells whether both sides have the
    same rows.
    """

    def __init__(self) -> None:
        self._rows = [0, 0]
        self._sums = [0, 0]

    def add(self, side: int, rows: Sequence[bytes]) -> None:
        self._rows[side] += len(rows)
        self._sums[side] += sum(int.from_bytes(_digest(row), "big") for row in rows)
        self._sums[side] %= 1 << (8 * DIGEST_BYTES)

    def counts(self) -> Counts:
        before, after = self._rows
        return Counts(
            before,
            after,
            None,
            None,
            None,
            before == after and self._sums[BEFORE] == self._sums[AFTER],
        )

    def close(self) -> None:
        pass


Tally = Keyed | Keyless


class Pace:
    """Adds the rows of both sides to a tally at the same pace, so that few rows have to wait for
    the equal row.
    """

    def __init__(self, tally: Tally, before: Iterator[Sequence[bytes]], stop: Stop) -> None:
        self._tally = tally
        self._before = before
        self._stop = stop
        self._ahead = 0
        """How many more rows of the side after than of the side before were added."""

    def after(self, rows: Sequence[bytes]) -> None:
        """Add rows of the side after, and as many of the side before."""
        self._stop.check()
        self._tally.add(AFTER, rows)
        self._ahead += len(rows)
        while self._ahead > 0 and self._follow():
            pass

    def end(self) -> Counts:
        """Add the remaining rows of the side before, and return the counts."""
        while self._follow():
            pass
        return self._tally.counts()

    def _follow(self) -> bool:
        """Add the next rows of the side before. Returns False if it has no more."""
        self._stop.check()
        rows = next(self._before, None)
        if rows is None:
            return False
        self._tally.add(BEFORE, rows)
        self._ahead -= len(rows)
        return True


def whole_rows(parts: Iterable[bytes]) -> Iterator[list[bytes]]:
    """The rows of these parts, in groups. A part may end within a row. Raises UnfitRow above
    LARGEST_ROW.
    """
    rest = bytearray()
    for part in parts:
        end = part.rfind(b"\n") + 1
        if end:
            yield lines(bytes(rest + part[:end]))
            rest.clear()
        rest += part[end:]
        if len(rest) > LARGEST_ROW:
            raise UnfitRow(f"a row is larger than {LARGEST_ROW // 1024**2} MiB")
    if rest:
        yield [bytes(rest)]


def lines(part: bytes) -> list[bytes]:
    """The rows of a part that holds whole rows. (splitlines() would also split at other line ends
    within a row.)
    """
    return part.removesuffix(b"\n").split(b"\n") if part else []


def _key_of(positions: Sequence[int]) -> Callable[[bytes], bytes]:
    """A function that returns the key of a row: the values of the columns at these positions."""
    if tuple(positions) == (0,):
        return lambda row: row.partition(b"\t")[0]
    last = max(positions) + 1

    def key_of(row: bytes) -> bytes:
        return _select(row.split(b"\t", last), positions)

    return key_of


def cut(columns: Sequence[str], kept: Sequence[str]) -> Callable[[list[bytes]], list[bytes]]:
    """A function that reduces rows with `columns` to the columns `kept`, in the order of `kept`."""
    if tuple(columns) == tuple(kept):
        return lambda rows: rows
    positions = [list(columns).index(name) for name in kept]

    def cut_rows(rows: list[bytes]) -> list[bytes]:
        return [_select(row.split(b"\t"), positions) for row in rows]

    return cut_rows


def _select(values: list[bytes], positions: Sequence[int]) -> bytes:
    try:
        return b"\t".join([values[position] for position in positions])
    except IndexError:
        raise UnfitRow("a row has fewer columns than the table") from None


def _size(rows: Collection[bytes]) -> int:
    return sum(map(len, rows)) + ROW_OVERHEAD * len(rows)


def _hashed(entry: tuple[bytes, int, bytes]) -> tuple[bytes, int, bytes]:
    key, side, row = entry
    return key if len(key) < DIGEST_BYTES else _digest(key), side, _digest(row)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=DIGEST_BYTES).digest()


@contextmanager
def _explained(stop: Stop) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        stop.check()
        raise BackupError(
            f"the rows could not be sorted: {error}. A comparison needs about 50 bytes of disk "
            "space for each row that differs: free some in the folder for temporary files, or set "
            "TMPDIR to another folder."
        ) from error
