"""Converts the values of a key to JSON and back. Allowed are the types that both databases sort in
the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any
from uuid import UUID

from batch_system.errors import ChunkError

_PLAIN = (bool, int, float, str)
_TAGGED: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    "datetime": (datetime, datetime.isoformat, datetime.fromisoformat),
    "date": (date, date.isoformat, date.fromisoformat),
    "time": (time, time.isoformat, time.fromisoformat),
    "uuid": (UUID, str, UUID),
    "decimal": (Decimal, str, Decimal),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "float": (float, repr, float),
}
"""By tag: the type, and how its values are written and read. A datetime is also a date, so datetime
comes first. Only infinite floats are tagged, because JSON has none.
"""


def encode(values: Sequence[Any]) -> list[Any]:
    """The values as JSON. Raises ChunkError for None, and for a type that is not allowed."""
    return [_encode(value) for value in values]


def decode(stored: Sequence[Any]) -> tuple[Any, ...]:
    """The values that were passed to `encode`."""
    return tuple(_decode(value) for value in stored)


def _encode(value: Any) -> Any:
    if type(value) in _PLAIN and not (isinstance(value, float) and math.isinf(value)):
        return value
    for tag, (kind, write, _) in _TAGGED.items():
        if isinstance(value, kind):
            return {tag: write(value)}
    if value is None:
        raise ChunkError(
            "a key is NULL in one of the rows, and rows can't be ordered by NULL: choose another "
            "key"
        )
    allowed = ", ".join([*(kind.__name__ for kind in _PLAIN), *_TAGGED])
    raise ChunkError(f"a key's value is {value!r}, a {type(value).__name__}; allowed: {allowed}")


def _decode(stored: Any) -> Any:
    if not isinstance(stored, dict):
        return stored
    [(tag, text)] = stored.items()
    return _TAGGED[tag][2](text)
