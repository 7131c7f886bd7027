"""The place in a loop as JSON: the values of a key, of the types that both databases keep in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any
from uuid import UUID

from service.errors import ChunkError

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
"""By tag: the type, how it is written and how it is read. A datetime is a date too, so it stands first. JSON has no
infinite floats."""


def encode(values: Sequence[Any]) -> list[Any]:
    """Raises ChunkError for a value whose type is not one of those above."""
    return [_encode(value) for value in values]


def decode(stored: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_decode(one) for one in stored)


def _encode(value: Any) -> Any:
    if type(value) in _PLAIN and not (isinstance(value, float) and math.isinf(value)):
        return value
    for tag, (kind, write, _) in _TAGGED.items():
        if isinstance(value, kind):
            return {tag: write(value)}
    if value is None:
        raise ChunkError("a key is NULL in one of the rows, and NULL has no place in an order: choose another key")
    allowed = ", ".join([*(kind.__name__ for kind in _PLAIN), *_TAGGED])
    raise ChunkError(f"a key's value is {value!r}, a {type(value).__name__}; allowed: {allowed}")


def _decode(stored: Any) -> Any:
    if not isinstance(stored, dict):
        return stored
    [(tag, text)] = stored.items()
    return _TAGGED[tag][2](text)
