"""Counting what was added, removed and changed, compared with a plain dict, and in constant
memory.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_system.backup.comparing import tally
from batch_system.backup.comparing.tally import (
    AFTER,
    BEFORE,
    Counts,
    Keyed,
    Keyless,
    Pace,
    UnfitRow,
    cut,
    lines,
    whole_rows,
)
from batch_system.concurrency.stoppable import Stop, Stopped
from tests.docs_blocks import ROOT

Rows = dict[tuple[int, str], str]

KEYS = st.tuples(st.integers(0, 12), st.text("ab日", max_size=1))
TABLES = st.dictionaries(KEYS, st.text("xyé\r\x85", max_size=2), max_size=25)
PARTS = st.lists(st.integers(1, 7), min_size=1)


def row(key: tuple[int, str], value: str) -> bytes:
    """A row whose key consists of the first and the last column."""
    return f"{key[0]}\t{value}\t{key[1]}".encode()


def in_parts(rows: Sequence[bytes], sizes: list[int]) -> Iterator[list[bytes]]:
    at = turn = 0
    while at < len(rows):
        size = sizes[turn % len(sizes)]
        yield lines(b"".join(one + b"\n" for one in rows[at : at + size]))
        at, turn = at + size, turn + 1


def counted(
    before: Sequence[bytes], after: Sequence[bytes], sizes: list[int], key: tuple[int, ...]
) -> Counts:
    with closing(Keyed(key, Stop()) if key else Keyless()) as made:
        pace = Pace(made, in_parts(before, sizes), Stop())
        for part in in_parts(after, sizes):
            pace.after(part)
        return pace.end()


@given(TABLES, TABLES, PARTS, st.randoms(use_true_random=False), st.sampled_from([0, 500, 10**9]))
def test_the_counts_are_those_of_a_plain_dict_whatever_the_order_and_parts_of_the_rows(
    before: Rows, after: Rows, sizes: list[int], random: Random, waiting: int
) -> None:
    for key in list(before)[::2]:  # few values, so that many rows are the same on both sides
        after = {**after, key: before[key]}
    sides = [[row(key, value) for key, value in side.items()] for side in (before, after)]
    for side in sides:
        random.shuffle(side)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tally, "WAITING_BYTES", waiting)
        found = counted(*sides, sizes, key=(0, 2))
    both = before.keys() & after.keys()
    changed = sum(before[key] != after[key] for key in both)
    added, removed = len(after.keys() - before.keys()), len(before.keys() - after.keys())
    expected = Counts(len(before), len(after), added, removed, changed, same=before == after)
    assert found == expected


@given(st.lists(st.sampled_from("abc")), st.lists(st.sampled_from("abc")), PARTS)
def test_tables_without_a_key_are_the_same_if_each_row_occurs_equally_often(
    before: list[str], after: list[str], sizes: list[int]
) -> None:
    sides = [[value.encode() for value in side] for side in (before, after)]
    assert counted(*sides, sizes, key=()) == Counts(
        len(before), len(after), None, None, None, same=Counter(before) == Counter(after)
    )


def test_columns_are_cut_out_and_put_in_order() -> None:
    assert cut(("a", "b", "c"), ("c", "a"))([b"1\t2\t3", b"\\N\t\t"]) == [b"3\t1", b"\t\\N"]
    assert cut(("a",), ())([b"1", b"2"]) == [b"", b""]


def test_a_row_of_no_columns_is_a_row() -> None:
    assert lines(b"\n\n") == [b"", b""] and lines(b"") == []


def test_a_comparison_ends_when_a_stop_is_requested() -> None:
    stop = Stop()
    with closing(Keyed((0,), stop)) as keyed:
        keyed.add(BEFORE, [b"%d" % number for number in range(1000)])
        pace = Pace(keyed, iter([]), stop)
        stop.request()
        with pytest.raises(Stopped):
            pace.after([b"1"])
        with pytest.raises(Stopped):
            pace.end()


def test_sorting_ends_when_a_stop_is_requested() -> None:
    stop = Stop()
    with closing(Keyed((0,), stop)) as keyed:
        keyed.add(AFTER, [b"%d" % number for number in range(50_000)])
        stop.request()
        with pytest.raises(Stopped):
            keyed.counts()


MEMORY = """
import sys
from batch_system.backup.comparing import tally
from batch_system.backup.comparing.tally import Keyed, Pace
from batch_system.concurrency.stoppable import Stop

tally.WAITING_BYTES //= 4
tally.PREPARE = tally.PREPARE.replace("-8000", "-1000")
rows = int(sys.argv[1])

def parts(order):
    for at in range(0, rows, 5000):
        yield [b"%d\\tvalue\\t%0200d" % (order(n), n) for n in range(at, at + 5000)]

pace = Pace(Keyed((0,), Stop()), parts(lambda n: n), Stop())
# The equal row of the other side never comes at the same time.
for part in parts(lambda n: rows - n):
    pace.after(part)
counts = pace.end()
peak = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))
print(counts.changed, peak // 1024)
"""


def test_memory_does_not_grow_with_the_rows_that_differ() -> None:
    found = {}
    for rows in (25_000, 75_000):
        command = [sys.executable, "-c", MEMORY, str(rows)]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        changed, found[rows] = map(int, ran.stdout.split())
        assert changed == rows - 2  # all but the first, the last and the middle key
    assert found[75_000] < found[25_000] + 8, found


@given(
    st.binary(max_size=60).map(lambda data: data + b"\n"), st.lists(st.integers(1, 9), min_size=1)
)
def test_rows_are_whole_however_the_pieces_are_cut(data: bytes, sizes: list[int]) -> None:
    pieces, at = [], 0
    while at < len(data):
        pieces.append(data[at : at + sizes[len(pieces) % len(sizes)]])
        at += len(pieces[-1])
    assert [row for rows in whole_rows(pieces) for row in rows] == lines(data)


def test_a_row_that_is_too_large_or_too_short_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "LARGEST_ROW", 10)
    assert list(whole_rows([b"12345", b"67890", b"\n"])) == [[b"1234567890"]]
    with pytest.raises(UnfitRow, match="a row is larger than"):
        list(whole_rows([b"12345"] * 3))
    with pytest.raises(UnfitRow, match="fewer columns"):
        cut(("a", "b", "c"), ("c", "a"))([b"1\t2"])
    with closing(Keyed((0, 2), Stop())) as made:
        made.add(BEFORE, [b"1\t2"])
        with pytest.raises(UnfitRow, match="fewer columns"):
            made.counts()
