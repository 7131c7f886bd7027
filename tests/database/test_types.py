"""Instants in the databases: they go in with any zone, and come back in UTC."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import literal, literal_column, select
from sqlalchemy.exc import StatementError

from batch_system.database.engine import Database
from batch_system.database.types import UtcDateTime

TOKYO = datetime(2026, 3, 10, 21, 0, 30, 123_456, tzinfo=ZoneInfo("Asia/Tokyo"))


@pytest.mark.parametrize(
    "instant", [TOKYO, TOKYO.replace(microsecond=0), datetime(1, 1, 1, tzinfo=UTC), None]
)
async def test_an_instant_comes_back_in_utc(ledger: Database, instant: datetime | None) -> None:
    async with ledger.reader.connect() as connection:
        read = (await connection.execute(select(literal(instant, UtcDateTime())))).scalar_one()
    assert read == instant
    assert read is None or read.tzinfo is UTC


async def test_an_instant_without_a_zone_is_refused(ledger: Database) -> None:
    async with ledger.reader.connect() as connection:
        with pytest.raises(StatementError, match="has no time zone"):
            await connection.execute(select(literal(TOKYO.replace(tzinfo=None), UtcDateTime())))


@pytest.mark.parametrize("ledger_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    "text",
    [
        "2026-03-10 12:00:30.123456",
        "2026-03-10T12:00:30.123456Z",
        "2026-03-10 21:00:30.123456+09:00",
    ],
)
async def test_text_that_something_else_has_written_into_sqlite_is_read(
    ledger: Database, text: str
) -> None:
    async with ledger.reader.connect() as connection:
        read = (
            await connection.execute(select(literal_column(f"'{text}'", UtcDateTime())))
        ).scalar_one()
    assert read == TOKYO
    assert read.tzinfo is UTC
