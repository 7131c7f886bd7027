"""Loops over all kinds of keys visit each row once: interrupted anywhere, with rows deleted,
updated and inserted.

The order of texts and UUIDs is that of the database. CHUNK_EXAMPLES sets the number of examples for
a longer run: `CHUNK_EXAMPLES=2000 pytest tests/batch/test_chunk_keys.py`. About 8 s.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from functools import partial
from itertools import count
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Double,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    String,
    Table,
    Time,
    UniqueConstraint,
    Uuid,
    delete,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from batch_system.batch.context import fencing
from batch_system.database.engine import Database
from batch_system.database.session import use_application_database
from batch_system.database.types import UtcDateTime
from batch_system.errors import ChunkError
from tests.batch.test_chunks import Attempt, task

EXAMPLES = int(os.environ.get("CHUNK_EXAMPLES", "0"))
SETTINGS = settings(
    max_examples=EXAMPLES or 40,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=list(HealthCheck),
    deadline=None,
)
NUMBERS = count()
MOST_CHUNKS = 30
"""A bound that fails the test when a loop makes no progress."""

SMALLEST = datetime.resolution
AT = datetime(2024, 2, 29, 23, 59, 59, 999_998)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5)
BIG = st.integers(-(2**63), 2**63 - 1)
KINDS: dict[str, tuple[Any, list[Any], st.SearchStrategy[Any]]] = {
    "whole": (BigInteger(), [-(2**63), -2, -1, 0, 2**53, 2**53 + 1, 2**63 - 1], BIG),
    "text": (String(), ["", " ", "a", "B", "b", "ä", "z", "ｚ", "\U0001f40d", "'"], TEXTS),
    "folded": (String(), ["", "a", "B", "c", "ä", "Ä", "_", "[", "a b", "ab"], TEXTS),
    "uuid": (
        Uuid(),
        [UUID(int=0), UUID(int=1), UUID(int=2**127), UUID(int=2**128 - 1)],
        st.uuids(),
    ),
    "aware": (
        UtcDateTime(),
        [
            (AT + n * SMALLEST).replace(tzinfo=ZoneInfo(zone))
            for n in range(3)
            for zone in ("Asia/Tokyo", "America/Lima")
        ],
        st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=st.timezones()),
    ),
    "naive": (
        DateTime(),
        [datetime(1, 1, 1), *(AT + n * SMALLEST for n in range(4)), datetime(9999, 12, 31)],
        st.datetimes(),
    ),
    "day": (Date(), [date.min, date(2024, 2, 29), date(2024, 3, 1), date.max], st.dates()),
    "hour": (Time(), [time.min, time(9), time(9, 0, 0, 1), time(10), time.max], st.times()),
    "price": (
        Numeric(12, 4),
        [
            Decimal(text)
            for text in (
                "-0.0002",
                "-0.0001",
                "0",
                "0.1",
                "0.2999",
                "0.3",
                "9",
                "10",
                "99999999.9999",
            )
        ],
        st.decimals(-(10**7), 10**7, places=4),
    ),
    "real": (
        Double(),
        [-1e308, -0.1, 0.0, 5e-324, 0.1 + 0.2, 0.3, 2.0**53, 1e22],
        st.floats(allow_nan=False, allow_infinity=False),
    ),
    "flag": (Boolean(), [False, True], st.booleans()),
    "data": (LargeBinary(), [b"", b"\0", b"\0\0", b"a", b"\xff"], st.binary(max_size=4)),
}
"""By name: a column's type, values close to each other or to the ends of its range, and a strategy
for any values.
"""


@dataclass(frozen=True)
class Case:
    """A table, a loop over it, and what happens during the loop.

    `key`: the names of columns, and whether their order is descending. `rows`: an id and the values
    of the columns of `kinds`. `start`, `stop`: the indexes in `rows` of the bounds of the loop.
    `spare`: rows that a body inserts. `acts`: what the bodies of the chunks do, one after another.
    `stops`: the numbers of the chunks at which the loop is interrupted, and whether that happens
    inside the block.
    """

    kinds: list[str]
    key: list[tuple[str, bool]]
    size: int
    rows: list[tuple[Any, ...]]
    spare: list[tuple[Any, ...]]
    start: int | None
    stop: int | None
    acts: list[str]
    stops: dict[int, bool]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kinds = draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3, unique=True))
    has_id = draw(st.booleans())
    names = draw(st.permutations([*kinds, *["id"] * has_id]))
    # Few values, so that parts of composite keys are equal.
    least, most = (6, 14) if len(names) == 1 else (1, 4)
    pools = [draw(st.lists(_values(kind), min_size=least, max_size=most)) for kind in kinds]
    values = st.tuples(BIG, *(st.sampled_from(pool) for pool in pools))
    unique = [_id] if has_id else [_id, _folded]
    rows = draw(st.lists(values, min_size=6 if has_id else 0, max_size=14, unique_by=tuple(unique)))
    middle = draw(st.integers(0, min(3, len(rows))))
    rows, spare = rows[middle:], rows[:middle]
    bound = st.none() | st.integers(0, len(rows) - 1) if rows else st.none()
    acts = st.sampled_from(["", "delete", "delete ahead", "update", "insert"])
    return Case(
        kinds,
        [(name, draw(st.booleans())) for name in names],
        draw(st.integers(1, 5)),
        rows,
        spare,
        draw(bound),
        draw(bound),
        draw(st.lists(acts, min_size=3, max_size=9)),
        draw(st.dictionaries(st.integers(1, 6), st.booleans(), max_size=2)),
    )


def _values(kind: str) -> st.SearchStrategy[Any]:
    _, close, any_one = KINDS[kind]
    return st.sampled_from(close) | any_one


def _id(row: tuple[Any, ...]) -> Any:
    return row[0]


def _folded(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """The text as NOCASE compares it, which ignores case in ASCII only."""
    return tuple(_lower(value) if isinstance(value, str) else value for value in row[1:])


def _lower(value: str) -> str:
    return "".join(sign.lower() if sign.isascii() else sign for sign in value)


class Interrupted(Exception):
    pass


class Walk:
    """A case on one database: its table, the loop over it, and the rows that it has to visit."""

    def __init__(self, case: Case, collation: str) -> None:
        self.case = case
        types = {kind: KINDS[kind][0] for kind in case.kinds} | {
            "folded": String(collation=collation)
        }
        columns = [Column(kind, types[kind], nullable=False) for kind in case.kinds]
        unique = (
            []
            if ("id", False) in case.key or ("id", True) in case.key
            else [UniqueConstraint(*case.kinds)]
        )
        own = (
            Column("id", BigInteger, primary_key=True, autoincrement=False),
            Column("done", Integer, default=0),
        )
        # A new name for each case, since PostgreSQL's driver caches prepared statements.
        self.table = Table(f"keyed_{next(NUMBERS)}", MetaData(), *own, *columns, *unique)
        self.order = [
            self.table.c[name].desc() if descends else self.table.c[name]
            for name, descends in case.key
        ]
        self.visited: list[int] = []
        self.must: set[int] = set()
        self.spare = list(case.spare)
        self.chunks = 0
        self.stops = dict(case.stops)

    async def over(self, database: Database) -> None:
        async with database.engine.begin() as connection:
            await connection.run_sync(self.table.metadata.create_all)
            if self.case.rows:
                await connection.execute(
                    insert(self.table), [self._values(row) for row in self.case.rows]
                )
        async with database.session(readonly=True) as db:
            self.must = set(self._within(await self._ordered(db)))
        attempt = Attempt()
        while True:
            try:
                await attempt.does(self.loop)
                break
            except Interrupted:
                attempt = Attempt(attempt)
        assert sorted(self.visited) == sorted(self.must)
        async with database.engine.begin() as connection:
            await connection.run_sync(self.table.metadata.drop_all)

    async def loop(self) -> None:
        source = select(self.table).where(self.table.c.done == 0)
        bounds = {name: self._bound(getattr(self.case, name)) for name in ("start", "stop")}
        async for chunk in task.chunks(
            source, key=tuple(self.order), size=self.case.size, **bounds
        ):
            assert self.chunks < MOST_CHUNKS
            stops = self.stops.pop(self.chunks + 1, None)
            async with chunk as (db, items):
                ids = [row.id for row in items]
                ordered = await self._ordered(db)
                assert ids == [id_ for id_ in ordered if id_ in set(ids)]
                must, spare = await self._act(db, ids, ordered)
                if stops is True:
                    raise Interrupted
            self.visited += ids
            self.must, self.spare = must, spare
            self.chunks += 1
            if stops is False:
                raise Interrupted

    async def _act(
        self, db: AsyncSession, ids: list[int], ordered: list[int]
    ) -> tuple[set[int], list[tuple[Any, ...]]]:
        """Change the table as a body does. Returns the ids that must be visited then, and the rows
        left to insert.
        """
        act = dict(enumerate(self.case.acts)).get(self.chunks, "")
        kept = {self._row(index) for index in (self.case.start, self.case.stop)}
        mine = self.table.c.id.in_([id_ for id_ in ids if id_ not in kept])
        if act == "update":
            await db.execute(update(self.table).where(mine).values(done=1))
        if act == "delete":
            await db.execute(delete(self.table).where(mine))
        if act == "delete ahead" and ids:
            gone = [id_ for id_ in ordered[ordered.index(ids[-1]) + 1 :] if id_ not in kept][:1]
            await db.execute(delete(self.table).where(self.table.c.id.in_(gone)))
            return self.must - set(gone), self.spare
        if act == "insert" and ids and self.spare:
            await db.execute(insert(self.table), [self._values(self.spare[0])])
            ordered, new = await self._ordered(db), self.spare[0][0]
            is_ahead = new in self._within(ordered) and ordered.index(new) > ordered.index(ids[-1])
            return self.must | ({new} if is_ahead else set()), self.spare[1:]
        return self.must, self.spare

    async def _ordered(self, db: AsyncSession) -> list[int]:
        return list((await db.scalars(select(self.table.c.id).order_by(*self.order))).all())

    def _within(self, ordered: Sequence[int]) -> Sequence[int]:
        """The ids from `start` (included) to `stop` (excluded), of ids in the order of the key."""
        start, stop = self._row(self.case.start), self._row(self.case.stop)
        first = 0 if start is None else ordered.index(start)
        return ordered[first:] if stop is None else ordered[first : ordered.index(stop)]

    def _row(self, index: int | None) -> int | None:
        return None if index is None else int(self.case.rows[index][0])

    def _bound(self, index: int | None) -> tuple[Any, ...] | None:
        if index is None:
            return None
        values = self._values(self.case.rows[index])
        return tuple(values[name] for name, _ in self.case.key)

    def _values(self, row: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(["id", *self.case.kinds], row, strict=True))


@pytest.fixture
async def collation(application: Database) -> str:
    """The name of a collation that does not order by code points."""
    use_application_database(application, partial(fencing.guard, idle_seconds=30))
    if application.kind == "sqlite":
        return "NOCASE"
    async with application.reader.connect() as connection:
        found = await connection.execute(
            text("SELECT collname FROM pg_collation WHERE collprovider IN ('c', 'i')")
        )
        for name in found.scalars():
            with contextlib.suppress(DBAPIError):  # this server was built without the collation
                async with connection.begin_nested():
                    if await connection.scalar(text(f"""SELECT 'a' < 'B' COLLATE "{name}" """)):
                        return str(name)
    return "C"


without_decimals = pytest.mark.filterwarnings("ignore:Dialect sqlite.* does .not. support Decimal")


@without_decimals
async def test_a_position_keeps_each_kind_of_key_exactly(
    application: Database, collation: str
) -> None:
    for kind, (_, values, _) in KINDS.items():
        rows = [(number, value) for number, value in enumerate(values)]
        for descends in (False, True):
            case = Case([kind], [(kind, descends)], 1, rows, [], None, None, [], {2: False})
            await Walk(case, collation).over(application)


@without_decimals
@SETTINGS
@given(case=cases())
async def test_each_row_is_visited_once_whatever_the_key(
    application: Database, collation: str, case: Case
) -> None:
    await Walk(case, collation).over(application)


@without_decimals
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("column", ["at", "price"])
@pytest.mark.parametrize("descends", [False, True])
async def test_a_key_in_another_format_made_by_sqlite_is_refused(
    application: Database, column: str, descends: bool
) -> None:
    """SQLite compares these values as text or floats, so the next page would not begin after the
    last row.
    """
    use_application_database(application, partial(fencing.guard, idle_seconds=30))
    columns = [
        Column("at", DateTime, nullable=False),
        Column("price", Numeric(12, 2), nullable=False),
    ]
    table = Table(
        f"made_{next(NUMBERS)}", MetaData(), Column("id", Integer, primary_key=True), *columns
    )
    async with application.engine.begin() as connection:
        await connection.run_sync(table.create)
        made = "VALUES (1, CURRENT_TIMESTAMP, 1.111), (2, CURRENT_TIMESTAMP, 2.222)"
        await connection.execute(text(f"INSERT INTO {table.name} (id, at, price) {made}"))
    key = tuple(
        column_.desc() if descends else column_ for column_ in (table.c[column], table.c.id)
    )
    with pytest.raises(
        ChunkError, match=rf"key=made_\d+\.{column}, made_\d+\.id in another format"
    ):
        await walk(table, key)


async def test_a_key_may_be_an_infinite_float(application: Database) -> None:
    use_application_database(application, partial(fencing.guard, idle_seconds=30))
    table = Table(f"made_{next(NUMBERS)}", MetaData(), Column("x", Double, primary_key=True))
    async with application.engine.begin() as connection:
        await connection.run_sync(table.create)
        await connection.execute(
            insert(table), [{"x": x} for x in (float("-inf"), 0.5, float("inf"))]
        )

    found = await Attempt().does(partial(walk, table, table.c.x))
    assert found == [float("-inf"), 0.5, float("inf")]


async def walk(table: Table, key: Any) -> list[Any]:
    seen: list[Any] = []
    async for chunk in task.chunks(select(table), key=key, size=1):
        async with chunk as (_, items):
            seen += items
    return seen
