"""The tally of slots: kept for buckets that have passed, and completed by a count of the others
when it is read.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import ColumnElement, Engine, Label, Select, bindparam, delete, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.selectable import TextualSelect

from batch_system import clock
from batch_system.batch.account.slots import Kind
from batch_system.batch.ledger import buckets, json_rows
from batch_system.batch.ledger.buckets import (
    CLASSES,
    LENGTH,
    NOT_ALL_GOOD,
    NOT_ALL_GOOD_SQL,
    NOT_RUN,
    bucket_of,
    tally,
)
from batch_system.batch.ledger.buckets import buckets as buckets_table
from batch_system.batch.night.counting import Counts, count
from batch_system.database import sql

OPEN_FOR = timedelta(minutes=2)
"""A bucket is counted this long after its end, if nothing in it is active. A later change marks
it.
"""

MOST_COUNTED_AT_ONCE = 300
"""The most buckets without a tally that are counted while a caller waits: the newest ones, two
days.
"""


KEPT_FOR = timedelta(hours=23)
"""The sums of younger buckets are kept in memory. Pruning, which leaves out the slots of an account
that begins later now, changes a tally without a count; it deletes no run of the last day.
"""


class _Sums(NamedTuple):
    """The sums of a bucket by class, as they were at its count."""

    counted_at: datetime
    sums: Counter[str]


_kept: WeakKeyDictionary[Engine, dict[datetime, _Sums]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Window:
    """The slots of a window by class. `accounted_from`: slots before it are not counted yet; None
    if all are.

    `not_run`: by task, how many slots were missed, paused or skipped, for tasks with such slots.
    `untallied`: the counts of buckets without a tally, by bucket and task.
    """

    counts: dict[str, int]
    by_bucket: dict[datetime, dict[str, int]]
    not_run: dict[str, Counter[str]]
    accounted_from: datetime | None
    untallied: Counts

    @property
    def due(self) -> int:
        """How many slots were due."""
        return sum(self.counts.values())


async def of_window(
    connection: AsyncConnection, since: datetime, until: datetime, now: datetime
) -> Window:
    """What became of the slots from `since` up to `until` (excluded; both aware, UTC).

    Buckets with a tally are read from it, and the others are counted now. Call it in one read
    transaction.
    """
    counted, rest, accounted_from = await divided(connection, since, until)
    by_bucket = await _sums_of(connection, counted, now)
    not_run = await _not_run(connection, accounted_from or since, until)
    untallied: Counts = {}
    for begin, end in intervals(rest):
        found = await count(connection, max(begin, since), min(end, until), now)
        untallied |= found.counts
        for (bucket, task), counts in found.counts.items():
            by_bucket.setdefault(bucket, Counter()).update(counts)
            not_run[task].update({name: counts[name] for name in NOT_RUN})
    complete = {
        bucket: {name: counts.get(name, 0) for name in CLASSES}
        for bucket, counts in sorted(by_bucket.items())
    }
    sums = {name: sum(counts[name] for counts in complete.values()) for name in CLASSES}
    some = {task: +counts for task, counts in sorted(not_run.items()) if +counts}
    return Window(sums, complete, some, accounted_from, untallied)


async def divided(
    connection: AsyncConnection, since: datetime, until: datetime
) -> tuple[dict[datetime, datetime], list[datetime], datetime | None]:
    """The buckets of a window that have a tally, each with the instant at which it was counted,
    those that have to be counted now, and the beginning of its account.
    """
    counted = {
        bucket: at
        for bucket, at in (await buckets.counted(connection, since, until)).items()
        if bucket + LENGTH <= until
    }
    rest = [bucket for bucket in buckets.between(since, until) if bucket not in counted]
    accounted_from = None
    if len(rest) > MOST_COUNTED_AT_ONCE:
        accounted_from = rest[-MOST_COUNTED_AT_ONCE]
        rest = [bucket for bucket in rest if bucket >= accounted_from]
        counted = {bucket: at for bucket, at in counted.items() if bucket >= accounted_from}
    return counted, rest, accounted_from


async def not_all_good(
    connection: AsyncConnection, since: datetime, until: datetime
) -> dict[datetime, Counter[str]]:
    """The sums of the slots that have not succeeded, from `since` up to `until` (excluded), in
    buckets with a tally.
    """
    rows = await connection.execute(_not_all_good(), {"since": since, "until": until})
    return {bucket: _counter(NOT_ALL_GOOD, sums) for bucket, *sums in rows}


@cache
def _not_all_good() -> Select[Any]:
    return (
        select(tally.c.bucket, *_sums(NOT_ALL_GOOD))
        .select_from(tally.join(buckets_table, buckets_table.c.bucket == tally.c.bucket))
        .where(*_within(), text(NOT_ALL_GOOD_SQL), buckets_table.c.counted_at.is_not(None))
        .group_by(tally.c.bucket)
    )


def _sums(names: Iterable[str]) -> list[Label[Any]]:
    return [func.sum(tally.c[name]).label(name) for name in names]


def _within() -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return tally.c.bucket >= bindparam("since"), tally.c.bucket < bindparam("until")


def _counter(names: Sequence[str], sums: Sequence[Any]) -> Counter[str]:
    """The sums of a row by their names. PostgreSQL gives sums as decimals."""
    return Counter(dict(zip(names, map(int, sums), strict=True)))


async def have_slots(
    connection: AsyncConnection, windows: Sequence[tuple[datetime, datetime]]
) -> list[bool]:
    """For each of these few windows, whether the tally has a slot within it (its end excluded)."""
    columns: list[str] = []
    ends: dict[str, datetime] = {}
    for number, (since, until) in enumerate(windows):
        ends |= {f"since_{number}": since, f"until_{number}": until}
        within = f"bucket >= :since_{number} AND bucket < :until_{number}"
        columns.append(f"EXISTS (SELECT 1 FROM batch_tally WHERE {within})")
    if not columns:
        return []
    types = dict.fromkeys(ends, tally.c.bucket)
    query = sql.statement(f"SELECT {', '.join(columns)}", **types)
    row = (await connection.execute(query, ends)).one()
    return [bool(has_any) for has_any in row]


async def of_tasks(
    connection: AsyncConnection, names: Collection[str], wanted: Collection[datetime]
) -> dict[str, dict[datetime, dict[str, int]]]:
    """The tally of these tasks, by bucket. It is read by its key, so `names` should be few."""
    found: dict[str, dict[datetime, dict[str, int]]] = {name: {} for name in names}
    if not found or not wanted:
        return found
    kind = connection.dialect.name
    values = {
        "names": json_rows.encode([{"task": name} for name in names], kind),
        "buckets": json_rows.encode([{"bucket": bucket} for bucket in wanted], kind),
    }
    for task, bucket, *counts in await connection.execute(_of_tasks(kind), values):
        found[task][bucket] = dict(zip(CLASSES, counts, strict=True))
    return found


@cache
def _of_tasks(kind: str) -> TextualSelect:
    columns = [tally.c[name] for name in ("task", "bucket", *CLASSES)]
    are_meant = (
        sql.among(
            f"t.{column.name}",
            f"SELECT v.{column.name} FROM {json_rows.source([column], kind, parameter=given)}",
            kind,
        )
        for column, given in ((tally.c.bucket, "buckets"), (tally.c.task, "names"))
    )
    return text(
        f"SELECT {', '.join(f't.{column.name}' for column in columns)} FROM batch_tally t "
        f"WHERE {' AND '.join(are_meant)}"
    ).columns(*columns)


async def _sums_of(
    connection: AsyncConnection, counted: Mapping[datetime, datetime], now: datetime
) -> dict[datetime, Counter[str]]:
    """The sums of the tally for each of these buckets, which are given with the instants at which
    they were counted.

    The sums of the last hours are kept, and read again when their bucket was counted anew: a day of
    5,000 tasks has 100,000 rows.
    """
    kept = _kept.setdefault(connection.sync_engine, {})
    sums = {
        bucket: kept[bucket].sums
        for bucket, at in counted.items()
        if bucket in kept and kept[bucket].counted_at == at
    }
    first = bucket_of(now - KEPT_FOR)
    rest = sorted(counted.keys() - sums.keys())
    for some in ([at for at in rest if at < first], [at for at in rest if at >= first]):
        if some:
            sums |= await _read(connection, some)
    if not clock.is_moved():  # a clock that stands still may give two counts the same instant
        kept |= {bucket: _Sums(at, sums[bucket]) for bucket, at in counted.items()}
    for bucket in [bucket for bucket in kept if bucket < first]:
        del kept[bucket]
    return {bucket: its for bucket, its in sums.items() if its}


async def _read(
    connection: AsyncConnection, wanted: Sequence[datetime]
) -> dict[datetime, Counter[str]]:
    """The sums of the tally for these buckets, which are sorted."""
    sums: dict[datetime, Counter[str]] = {bucket: Counter() for bucket in wanted}
    values = {"since": wanted[0], "until": wanted[-1] + LENGTH}
    for names in (("succeeded",), NOT_ALL_GOOD):
        for bucket, *sums_of_bucket in await connection.execute(_by_bucket(names), values):
            if bucket in sums:
                sums[bucket].update(_counter(names, sums_of_bucket))
    return sums


@cache
def _by_bucket(names: tuple[str, ...]) -> Select[Any]:
    query = select(tally.c.bucket, *_sums(names)).where(*_within()).group_by(tally.c.bucket)
    return query.where(text(NOT_ALL_GOOD_SQL)) if names == NOT_ALL_GOOD else query


async def _not_run(
    connection: AsyncConnection, since: datetime, until: datetime
) -> dict[str, Counter[str]]:
    """For each task, the sums of the slots in the tally that did not run, from `since` up to the
    last whole bucket.
    """
    found: dict[str, Counter[str]] = defaultdict(Counter)
    values = {"since": since, "last": until - LENGTH}
    for task, *sums_of_task in await connection.execute(_by_task(), values):
        found[task] = _counter(NOT_RUN, sums_of_task)
    return found


@cache
def _by_task() -> Select[Any]:
    return (
        select(tally.c.task, *_sums(NOT_RUN))
        .select_from(tally.join(buckets_table, buckets_table.c.bucket == tally.c.bucket))
        .where(
            tally.c.bucket >= bindparam("since"),
            tally.c.bucket <= bindparam("last"),
            text(NOT_ALL_GOOD_SQL),
            tally.c.missed + tally.c.paused + tally.c.skipped > 0,
            buckets_table.c.counted_at.is_not(None),
        )
        .group_by(tally.c.task)
    )


def intervals(wanted: Sequence[datetime]) -> list[tuple[datetime, datetime]]:
    """The intervals that these buckets form together."""
    found: list[tuple[datetime, datetime]] = []
    for bucket in sorted(wanted):
        if found and found[-1][1] == bucket:
            found[-1] = (found[-1][0], bucket + LENGTH)
        else:
            found.append((bucket, bucket + LENGTH))
    return found


@dataclass(frozen=True)
class Kept:
    """`counted`: how many buckets have a tally now. `left`: those that can't be counted yet.

    `unaccounted`: by task, how many slots in these buckets have neither a run nor a missed range
    although a cursor is past them. Slots that no service has reached yet are late; they are
    reported with the reason why services do not fire.
    """

    counted: int
    left: list[datetime]
    unaccounted: Counter[str]


async def keep(connection: AsyncConnection, wanted: Sequence[datetime], now: datetime) -> Kept:
    """Count these buckets, and keep the counts of those without active slots, in the caller's
    transaction.
    """
    if not wanted:
        return Kept(0, [], Counter())
    await buckets.lock(connection, wanted, now)
    counts: Counts = {}
    unhandled: set[datetime] = set()
    unaccounted: Counter[str] = Counter()

    def note(task: str, _slot: datetime, kind: Kind) -> None:
        unaccounted[task] += kind == Kind.GAP

    for begin, end in intervals(wanted):
        found = await count(connection, begin, end, now, note)
        counts |= found.counts
        unhandled |= found.unhandled
    active = {bucket for (bucket, _), classes in counts.items() if classes["active"]}
    left = sorted({bucket for bucket in wanted if bucket in active | unhandled})
    kept = [bucket for bucket in wanted if bucket not in left]
    await _write(connection, kept, counts)
    await buckets.unmark(connection, left)
    return Kept(len(kept), left, +unaccounted)


async def _write(connection: AsyncConnection, kept: Sequence[datetime], counts: Counts) -> None:
    among = json_rows.is_among(tally.c.bucket, kept, connection.dialect.name)
    await connection.execute(delete(tally).where(among))
    wanted = set(kept)
    rows = [
        {"bucket": bucket, "task": task, **{name: classes[name] for name in CLASSES}}
        for (bucket, task), classes in sorted(counts.items())
        if bucket in wanted
    ]
    await json_rows.insert(connection, tally, rows)


def may_be_over(now: datetime) -> datetime:
    """Buckets before this one may be counted for good at `now`."""
    return bucket_of(now - OPEN_FOR)


def until_next(now: datetime) -> timedelta:
    """The time from `now` until one more bucket may be counted."""
    return may_be_over(now) + LENGTH + OPEN_FOR - now


async def unaccounted(connection: AsyncConnection, names: Collection[str]) -> set[str]:
    """Those of these tasks that have unaccounted slots in the tally."""
    found = set()
    for name in names:
        query = select(tally.c.bucket).where(tally.c.task == name, text("unaccounted > 0")).limit(1)
        if (await connection.execute(query)).first() is not None:
            found.add(name)
    return found


def summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums of counts by class, without classes whose sum is zero."""
    total: dict[str, int] = {}
    for each in counts:
        for name, number in each.items():
            total[name] = total.get(name, 0) + number
    return {name: number for name, number in total.items() if number > 0}
