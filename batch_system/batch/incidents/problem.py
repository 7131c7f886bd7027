"""One error is one problem: open incidents of several tasks that began together, with the same
error.

In the ledger, each task and error has its own incident. Code that shows or sends incidents, or acts
on them, asks here which of them are one problem.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.execution.fingerprint import without_changing
from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.tables import attempts, runs

FEWEST = 5
"""At least this many incidents with one error are one problem."""
TOGETHER = timedelta(minutes=10)
"""They must have been opened within this time."""
KEY = "error"
"""The name of the error's key in the details of an incident."""

_FRAME = re.compile(r'^  File "([^"\n]+)", line \d+, in (\S+)', re.MULTILINE)

Item = TypeVar("Item")


def groups(
    items: Iterable[Item], facts: Callable[[Item], tuple[str | None, datetime | None]]
) -> list[list[Item]]:
    """The items in groups, one for each problem, in the order of the first item of each.

    `facts`: returns the key of an item's error, and when its incident was opened. An item with None
    for either stays alone.
    """
    order, found = list(items), defaultdict(list)
    for number, item in enumerate(order):
        key, opened_at = facts(item)
        if key is not None and opened_at is not None:
            found[key].append((opened_at, number))
    together: dict[int, list[int]] = {}
    for members in found.values():
        for burst in _bursts(sorted(members)):
            if len(burst) >= FEWEST:
                together |= dict.fromkeys(burst, sorted(burst))
    return [
        [order[each] for each in together.get(number, [number])]
        for number in range(len(order))
        if together.get(number, [number])[0] == number
    ]


def _bursts(members: Sequence[tuple[datetime, int]]) -> Iterable[list[int]]:
    """The members in the order of time, divided where one was opened more than TOGETHER after the
    first of its group.
    """
    burst: list[int] = []
    began: datetime | None = None
    for at, number in members:
        if began is None or at - began > TOGETHER:
            if burst:
                yield burst
            burst, began = [], at
        burst.append(number)
    if burst:
        yield burst


def key_of(facts: Mapping[str, Any]) -> str:
    """The key of an error: its class, the first line of its message, and the innermost frame of its
    traceback.

    `facts`: as from `failures.facts_of`.
    """
    message = str(facts.get("message") or "").strip()
    first_line = without_changing(message.split("\n")[0])
    frames = _FRAME.findall(str(facts.get("traceback") or ""))
    parts = (str(facts.get("type") or ""), first_line, *(frames[-1] if frames else ()))
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:12]


async def keys(connection: AsyncConnection, ids: Sequence[str]) -> dict[str, str]:
    """The keys of the last errors of these runs, by run."""
    if not ids:
        return {}
    theirs = json_rows.is_among(runs.c.id, ids, connection.dialect.name)
    of_last = (attempts.c.run == runs.c.id, attempts.c.fence == runs.c.fence)
    query = (
        select(runs.c.id, attempts.c.error).join(attempts, of_last[0] & of_last[1]).where(theirs)
    )
    return {row.id: key_of(row.error) for row in await connection.execute(query) if row.error}


def of_rows(rows: Iterable[Row[Any]]) -> list[list[Row[Any]]]:
    """Open incidents in groups, one for each problem."""
    return groups(rows, lambda row: (key_in(row.details), row.opened_at))


def key_in(details: Mapping[str, Any] | None) -> str | None:
    """The key in the details of an incident; None if it has none."""
    return (details or {}).get(KEY)
