"""Counts what two streams of rows have in common, whatever the order of either, and in flat memory.

Rows are bytes as COPY writes them, each unlike all others of its side. Those that both sides have cancel each other out
while they pass by; what is left waits for its counterpart, and when too much is waiting, hashes of it go into a file of
SQLite's. That file has no name, so it is gone with its process. At the end SQLite sorts it by key.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import blake2b

from service.concurrency.stoppable import Stop
from service.errors import BackupError

BEFORE, AFTER = 0, 1
WAITING_BYTES = 12 * 1024 * 1024
LARGEST_ROW = 32 * 1024 * 1024
"""Bytes of a row of a backup: the one thing that can't be compared in pieces."""
ROW_OVERHEAD = 120
"""Bytes that Python needs for a row in a set, beside those of the row."""
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
SELECT coalesce(sum(before = 0), 0), coalesce(sum(after = 0), 0), coalesce(sum(before AND after AND NOT same), 0) FROM (
    SELECT sum(side = 0) AS before, sum(side = 1) AS after, min(row) = max(row) AS same FROM spilled GROUP BY key
)
"""


class UnfitRow(Exception):
    """A row that can't be compared, and why."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How many rows only one side has, and how many both have with other values. None: the table has no key."""

    before: int
    after: int
    added: int | None
    removed: int | None
    changed: int | None
    same: bool


class Keyed:
    """Compares rows that have a key: `key` are the places of its columns."""

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
        met = new & other
        other -= met
        new -= met
        self._size += _size(new) - _size(met)
        self._waiting[side].update(new)
        if self._size > WAITING_BYTES:
            self._spill()

    def counts(self) -> Counts:
        """The end: both sides have given all."""
        self._spill()
        with _explained(self._stop), closing(self._opened()) as file:
            added, removed, changed = file.execute(COUNT).fetchone()
        self._file = None
        changed += self._changed
        before, after = self._rows
        return Counts(before, after, added, removed, changed, same=not (added or removed or changed))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _spill(self) -> None:
        """Rows whose key both sides have differ in the rest, for equal ones are gone. The others go into the file."""
        before, after = ({self._key_of(row): row for row in rows} for rows in self._waiting)
        both = before.keys() & after.keys()
        self._changed += len(both)
        with _explained(self._stop):
            for side, rows in enumerate((before, after)):
                left = ((key, side, rows[key]) for key in rows.keys() - both)
                self._opened().executemany("INSERT INTO spilled VALUES (?, ?, ?)", map(_hashed, left))
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
    """Compares rows that have no key, and may be there several times: only whether both sides have the same."""

    def __init__(self) -> None:
        self._rows = [0, 0]
        self._sums = [0, 0]

    def add(self, side: int, rows: Sequence[bytes]) -> None:
        self._rows[side] += len(rows)
        self._sums[side] += sum(int.from_bytes(_digest(row), "big") for row in rows)
        self._sums[side] %= 1 << (8 * DIGEST_BYTES)

    def counts(self) -> Counts:
        before, after = self._rows
        return Counts(before, after, None, None, None, before == after and self._sums[BEFORE] == self._sums[AFTER])

    def close(self) -> None:
        pass


Tally = Keyed | Keyless


class Pace:
    """Feeds a tally from both sides at the same speed, so that equal rows meet while they pass by."""

    def __init__(self, tally: Tally, before: Iterator[Sequence[bytes]], stop: Stop) -> None:
        self._tally = tally
        self._before = before
        self._stop = stop
        self._ahead = 0
        """How many rows more of the other side there were."""

    def after(self, rows: Sequence[bytes]) -> None:
        self._stop.check()
        self._tally.add(AFTER, rows)
        self._ahead += len(rows)
        while self._ahead > 0 and self._follow():
            pass

    def end(self) -> Counts:
        while self._follow():
            pass
        return self._tally.counts()

    def _follow(self) -> bool:
        """False when the side before has no more."""
        self._stop.check()
        rows = next(self._before, None)
        if rows is None:
            return False
        self._tally.add(BEFORE, rows)
        self._ahead -= len(rows)
        return True


def whole_rows(parts: Iterable[bytes]) -> Iterator[list[bytes]]:
    """The rows of parts that may end amidst one. Raises UnfitRow for one that is larger than LARGEST_ROW."""
    begun = bytearray()
    for part in parts:
        end = part.rfind(b"\n") + 1
        if end:
            yield lines(bytes(begun + part[:end]))
            begun.clear()
        begun += part[end:]
        if len(begun) > LARGEST_ROW:
            raise UnfitRow(f"a row is larger than {LARGEST_ROW // 1024**2} MiB")
    if begun:
        yield [bytes(begun)]


def lines(part: bytes) -> list[bytes]:
    """The rows of a part that holds whole ones. (Not splitlines(): a row may hold other ends of lines.)"""
    return part.removesuffix(b"\n").split(b"\n") if part else []


def _key_of(places: Sequence[int]) -> Callable[[bytes], bytes]:
    if tuple(places) == (0,):
        return lambda row: row.partition(b"\t")[0]
    last = max(places) + 1

    def key_of(row: bytes) -> bytes:
        return _chosen(row.split(b"\t", last), places)

    return key_of


def cut(columns: Sequence[str], wanted: Sequence[str]) -> Callable[[list[bytes]], list[bytes]]:
    """A function that leaves of each row the wanted columns, in their order."""
    if tuple(columns) == tuple(wanted):
        return lambda rows: rows
    places = [list(columns).index(name) for name in wanted]

    def cut_rows(rows: list[bytes]) -> list[bytes]:
        return [_chosen(row.split(b"\t"), places) for row in rows]

    return cut_rows


def _chosen(values: list[bytes], places: Sequence[int]) -> bytes:
    try:
        return b"\t".join([values[place] for place in places])
    except IndexError:
        raise UnfitRow("a row has fewer columns than the table") from None


def _size(rows: Collection[bytes]) -> int:
    return sum(map(len, rows)) + ROW_OVERHEAD * len(rows)


def _hashed(left: tuple[bytes, int, bytes]) -> tuple[bytes, int, bytes]:
    key, side, row = left
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
            f"the rows could not be sorted: {error}. A comparison needs room for about 50 bytes of each row that "
            "differs: free some in the folder for temporary files, or set TMPDIR to another one."
        ) from error
