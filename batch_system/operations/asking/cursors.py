"""Cursors: the place of a row in a list, from which the next page goes on."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated

from pydantic import StringConstraints

from batch_system.errors import InvalidParameters
from batch_system.escaping import echoed

Key = tuple[datetime, str]
"""The place of a row: its instant, and its id."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
CURSOR = r"^[0-9]{1,16}_[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
"""The place of a row in a list: microseconds since 1970 (UTC), and the id of the row."""

Cursor = Annotated[str, StringConstraints(pattern=CURSOR)]


def cursor_of(key: Key) -> str:
    """The cursor for a key of a page."""
    at, id = key
    return f"{(at - EPOCH) // timedelta(microseconds=1)}_{id}"


def parse_cursor(given: str) -> Key:
    """The key in a cursor. Raises InvalidParameters."""
    if not re.fullmatch(CURSOR, given):
        raise InvalidParameters(
            f"after is {echoed(given)}; allowed: the cursor that a page of this list has given"
        )
    microseconds, _, id = given.partition("_")
    return EPOCH + timedelta(microseconds=int(microseconds)), id
