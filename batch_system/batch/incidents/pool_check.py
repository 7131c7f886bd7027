"""Finds pools whose runs wait in vain, because no node executes the runs of the pool, or none of
its nodes has their task.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import pools
from batch_system.batch.ledger.incidents.incidents import Opening
from batch_system.batch.ledger.pools import MOST_COUNTED, InVain
from batch_system.batch.ledger.states import IncidentKind

PATIENCE = timedelta(minutes=1)
"""How long runs may wait in vain before that is an incident. A deploy may stop the nodes of a pool
for a moment.
"""
MOST_NAMED = 10
"""The most tasks that a message names."""
NOT_LOADED = "not loaded"
"""The fingerprint of an incident if the pool has nodes but none of them has the task."""

Key = tuple[str, str, str, str]


class PoolCheck:
    """Remembers since when the runs of each pool wait in vain, as this node has seen it."""

    def __init__(self) -> None:
        self._since: dict[Key, datetime] = {}
        self.tasks: frozenset[str] = frozenset()
        """The tasks whose runs wait in vain, as of the last check. That they are late is not
        reported separately.
        """

    async def check(
        self, connection: AsyncConnection, known: Collection[Key], now: datetime
    ) -> tuple[list[Opening], datetime | None]:
        """The incidents of pools whose runs have waited in vain for a minute, and when more may
        follow.

        `known`: the keys of the open incidents. These continue as long as runs wait in vain, even
        if this node has seen that only now.
        """
        in_vain = await pools.in_vain(connection, now)
        self.tasks = frozenset(each.task for each in in_vain)
        found = [_opening(rows, now) for rows in grouped(in_vain).values()]
        self._since = {opening.key: self._since.get(opening.key, now) for opening in found}
        is_due = {
            key for key, since in self._since.items() if key in known or since + PATIENCE <= now
        }
        later = [since + PATIENCE for key, since in self._since.items() if key not in is_due]
        return [opening for opening in found if opening.key in is_due], min(later, default=None)


def grouped(found: Sequence[InVain]) -> dict[tuple[str, bool], list[InVain]]:
    """The tasks by pool, and by whether the pool has nodes (none of which has the tasks)."""
    groups: dict[tuple[str, bool], list[InVain]] = {}
    for each in found:
        groups.setdefault((each.pool, each.is_claimed), []).append(each)
    return groups


def _opening(waiting: Sequence[InVain], now: datetime) -> Opening:
    pool, is_claimed = waiting[0].pool, waiting[0].is_claimed
    names = [each.task for each in waiting]
    return Opening(
        IncidentKind.POOL,
        why(pool, names, sum(each.waiting for each in waiting), is_claimed=is_claimed),
        now,
        task=names[0] if is_claimed and len(names) == 1 else "",
        subject=pool,
        fingerprint=NOT_LOADED if is_claimed else "",
        details={"pool": pool, "tasks": names[:MOST_NAMED]},
    )


def why(pool: str, tasks: Sequence[str], waiting: int, *, is_claimed: bool) -> str:
    """Why the runs of a pool wait in vain, and what to do, in words.

    `tasks`: the tasks of these runs. `waiting`: their number. `is_claimed`: the pool has nodes, but
    none of them has these tasks.
    """
    if is_claimed:
        has = f"no node of pool {pool} has {'task' if len(tasks) == 1 else 'tasks'} {_named(tasks)}"
        waits = f": {_wait(waiting)}" if waiting else ""
        what = "the file of the task" if len(tasks) == 1 else "the files of the tasks"
        return f"{has}{waits}; give its nodes {what}"
    if waiting:
        about = f": {_wait(waiting, f' of {_named(tasks)}' if tasks else '')}"
    else:
        about = f", which has the {_plural('task', len(tasks))} {_named(tasks)}" if tasks else ""
    return f"no node serves pool {pool}{about}; {advice(pool)}"


def advice(pool: str) -> str:
    """What to do so that a pool is served."""
    setting = f"BATCH_POOL_{pool.upper()}"
    command = f"`batch work --pool {pool}`"
    return (
        f"start {command} on some machine, or the Dask cluster that {setting} names, or set "
        f"{setting}=process"
    )


def _wait(number: int, whose: str = "") -> str:
    at_least = "at least " if number >= MOST_COUNTED else ""
    return f"{at_least}{number:,} {_plural('run', number)}{whose} wait{'s' if number == 1 else ''}"


def _plural(noun: str, number: int) -> str:
    return noun if number == 1 else f"{noun}s"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
