"""Column types that behave the same on SQLite and PostgreSQL, and new ids."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, DateTime, Dialect, String
from sqlalchemy.dialects.postgresql import JSONB, UUID
from sqlalchemy.types import TypeDecorator

from batch_system import clock

Id = String(36).with_variant(UUID(as_uuid=False), "postgresql")
Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def new_id() -> str:
    """A new UUIDv7: ids sort by the time of their making (RFC 9562, method 3: 12 bits below the
    millisecond).
    """
    milliseconds, nanoseconds = divmod(clock.unix_ns(), 1_000_000)
    high = milliseconds << 16 | 0x7000 | nanoseconds * 4096 // 1_000_000
    digits = f"{high:016x}{0x8000000000000000 | secrets.randbits(62):016x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


class UtcDateTime(TypeDecorator[datetime]):
    """An instant. Takes aware datetimes in any zone and returns them in UTC. Raises ValueError for
    a naive one.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone: give an aware datetime")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def result_processor(
        self, dialect: Dialect, coltype: object
    ) -> Callable[[Any], datetime | None]:
        """A function that converts the driver's value to an instant. It is called for very many
        values.
        """
        return _from_sqlite if dialect.name == "sqlite" else _in_utc


def _from_sqlite(value: str | None) -> datetime | None:
    if value is None:
        return None
    try:
        return datetime.fromisoformat(value + "+00:00")
    except ValueError:  # another program wrote it, with an offset
        return datetime.fromisoformat(value).astimezone(UTC)


def _in_utc(value: datetime | None) -> datetime | None:
    if value is None or value.tzinfo is UTC:
        return value
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def stamp(value: datetime | None, kind: str) -> str | None:
    """An instant (aware) as text for a JSON parameter, in the form in which a database of this kind
    stores it.
    """
    if value is None:
        return None
    if value.tzinfo is not UTC:
        value = value.astimezone(UTC)
    return (
        value.isoformat(" ", "microseconds").removesuffix("+00:00")
        if kind == "sqlite"
        else value.isoformat()
    )
