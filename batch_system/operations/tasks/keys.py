"""The keys of a task with a limit: how many runs of each are running, and how many wait."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import Field

from batch_system.batch.ledger import key_counts
from batch_system.batch.ledger import tasks as task_rows
from batch_system.batch.queue import concurrency, key_queues
from batch_system.batch.tasks.limit import Queueing
from batch_system.errors import InvalidParameters
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import Result
from batch_system.operations.people.redacting import hidden_tasks
from batch_system.operations.starting.startable import unknown_task

PAGE = 100
HIDDEN = "(hidden)"


class Key(Result):
    """A value of the parameter of a limit. `queue`: the name of its queue. `key`: such as
    "tenant=acme"; the name of the task for a limit without a parameter. `limit`: how many runs may
    run at once. `waiting`: up to 1,000 are counted. `oldest`: since when the one that waits longest
    could have started, among these. `failing`: how many have failed and were neither made good nor
    acknowledged; up to 1,000 of the task are counted.
    """

    queue: str
    key: str
    limit: int
    running: int
    waiting: int
    oldest: datetime | None = None
    failing: int = 0


class KeyPage(Result):
    """Keys in the order of their queues. `after`: the queue after which the next page begins; None
    at the end, and for a task whose keys are hidden. `parameter`: whose values they are; None for a
    limit of all runs together. `total`: how many runs of all keys may run at once. `rate`: how many
    may begin within `per` seconds.
    """

    keys: list[Key] = Field(default_factory=list)
    after: str | None = None
    parameter: str | None = None
    total: int | None = None
    rate: int | None = None
    per: float | None = None


async def keys_of(context: Context, name: str, after: str = "", limit: int = PAGE) -> KeyPage:
    """The keys of a task that have running, waiting or failing runs. Raises UnknownTask, and
    InvalidParameters for a task without a limit.
    """
    async with context.databases.reading() as connection:
        row = await task_rows.get(connection, name) if connection is not None else None
        if connection is None or row is None:
            raise await unknown_task(connection, context, name)
        queueing = Queueing.of_policies(name, row["policies"])
        if queueing.limit is None:
            raise InvalidParameters(f"task {name} has no limit, and so no keys")
        waiting = await key_queues.behind(connection, {name: after}, limit + 1, retries=True)
        running = await key_counts.running(connection, queueing.prefix, after, limit + 1)
        failing = await key_counts.failing(connection, name, after, limit + 1)
        known = {*waiting[name], *running, *failing}
        found = await key_counts.counted(connection, name, list(known))
        queues = [each.queue for each in found]
        numbers = await concurrency.numbers_of(connection, queueing.limit, queues)
        is_hidden = name in await hidden_tasks(connection, context)
    keys = [
        _key(each, queueing, numbers[each.queue], failing.get(each.queue), is_hidden)
        for each in found[:limit]
    ]
    has_more = len(found) > limit and not is_hidden
    limited, rate = queueing.limit, queueing.rate
    return KeyPage(
        keys=keys,
        after=keys[-1].queue if has_more else None,
        parameter=limited.key,
        total=limited.total,
        rate=rate.number if rate is not None else None,
        per=rate.per if rate is not None else None,
    )


def _key(
    row: Any,
    queueing: Queueing,
    limit: int,
    failing: tuple[int, dict[str, Any] | None] | None,
    is_hidden: bool,
) -> Key:
    """`failing`: how many of its runs have failed, and the parameters of one of them."""
    failed, params = failing or (0, None)
    return Key(
        queue=HIDDEN if is_hidden else row.queue,
        key=HIDDEN if is_hidden else queueing.words_of(row.params or params),
        limit=limit,
        running=row.running,
        waiting=row.waiting,
        oldest=row.oldest,
        failing=failed,
    )
