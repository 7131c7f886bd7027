"""How many tickets of each task should be open now: one for each run that may start or is running,
limited by the places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger.tables import HELD_SQL, runs
from batch_system.batch.queue import claiming, concurrency
from batch_system.batch.tasks.registry import Task

TICKETS_A_PLACE = 2
"""How many tickets may wait for each place. With one, a place would be idle until the next look."""


@dataclass
class Wanted:
    """How many tickets of one task should be open, the priority of the first run that they are for,
    and how many runs of the task are running.
    """

    tickets: int = 0
    priority: int = 0
    running: int = 0


async def demand(
    connection: AsyncConnection,
    tasks: Mapping[str, Task],
    pool: str,
    places: int,
    running: Counter[str],
) -> dict[str, Wanted]:
    """The tickets of each task of the pool, in the order in which they should be placed: that of
    the queue.

    Each task with a run that may start gets a ticket, because the tasks before it may find no place
    at all, such as one with their memory or their file.

    `tasks`: those that this service has loaded. `running`: the result of `running`.
    """
    due = await claiming.due(connection, [pool])
    own = [task for name, task in tasks.items() if task.pool == pool]
    most = TICKETS_A_PLACE * places
    wanted: dict[str, Wanted] = {}
    if due.names and most:
        rules = concurrency.rules(task for task in own if task.name in due.names)
        names, limit = sorted(due.names), most
        heads = await claiming.heads(connection, names, due.now, limit, rules, retries=due.retries)
        for head in heads:
            wanted.setdefault(head.task, Wanted(0, head.priority)).tickets += 1
        while len(heads) == limit and (names := sorted(due.names - wanted.keys())):
            limit = 2 * len(names)
            heads = await claiming.heads(
                connection, names, due.now, limit, rules, retries=due.retries
            )
            for head in heads:
                wanted.setdefault(head.task, Wanted(1, head.priority))
    for task in own:
        if running[task.name]:
            one = wanted.setdefault(task.name, Wanted())
            one.running = running[task.name]
            one.tickets += one.running
    for one in wanted.values():
        one.tickets = min(one.tickets, most)
    return wanted


async def running(connection: AsyncConnection) -> Counter[str]:
    """How many runs of each task are running. Reads all running runs."""
    return Counter((await connection.execute(_RUNNING)).scalars())


_RUNNING = select(runs.c.task).where(text(HELD_SQL))
"""Without GROUP BY, because SQLite would read all runs with it."""
