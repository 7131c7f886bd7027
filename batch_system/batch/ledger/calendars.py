"""The dates that schedules leave out, by their hash: each is written once, and never changed."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Column, String, Table, Text, select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.calendar import ExcludedDates, parted, remember, remembered
from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.tables import ledger
from batch_system.database.types import Json

# `weekend`: numbers of weekdays, Monday is 0. `until`: after this date, the dates are not known.
calendars = Table(
    "batch_calendars",
    ledger,
    Column("id", String(32), primary_key=True),
    Column("name", Text, nullable=False),
    Column("dates", Json, nullable=False),
    Column("weekend", Json, nullable=False),
    Column("until", String(10)),
)


async def read(connection: AsyncConnection, crons: Iterable[str]) -> None:
    """Read the dates that these expressions leave out, so that this process can use them.

    Dates that are missing, damaged, or of another hash stay unknown: their schedules can't be used.
    """
    ids = {identity for cron in crons if (identity := parted(cron)[1]) and not remembered(identity)}
    if not ids:
        return
    is_meant = json_rows.is_among(calendars.c.id, ids, connection.dialect.name)
    for row in await connection.execute(select(calendars).where(is_meant)):
        try:
            found = ExcludedDates.from_json(row.name, row.dates, row.weekend, row.until)
        except (ValueError, TypeError, AttributeError):
            continue
        if found.id == row.id:
            remember(found)


async def write(connection: AsyncConnection, new: Iterable[ExcludedDates | None]) -> None:
    """Write these dates, unless the ledger has them."""
    rows = [
        {
            "id": dates.id,
            "name": dates.name,
            "dates": dates.dates_as_json,
            "weekend": sorted(dates.weekend),
            "until": dates.until_as_json,
        }
        for dates in sorted({each for each in new if each is not None}, key=lambda each: each.id)
    ]
    if rows:
        await json_rows.insert(connection, calendars, rows, "(id)")


def told(cron: str) -> dict[str, str]:
    """An expression of the ledger for people: the expression alone, and what it leaves out."""
    expression, identity = parted(cron)
    if identity is None:
        return {"cron": expression}
    dates = remembered(identity)
    name = f"{dates.name}: {len(dates.dates):,} dates" if dates is not None else "unknown dates"
    return {"cron": expression, "except_on": f"{name} ({identity[:8]})"}
