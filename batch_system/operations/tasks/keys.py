"""The keys of a task with a limit: how many runs of each are running, and how many wait."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from batch_system.batch.ledger import key_counts
from batch_system.batch.ledger import tasks as task_rows
from batch_system.batch.queue import key_queues, turns
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
    could have started, among these.
    """

    queue: str
    key: str
    limit: int
    running: int
    waiting: int
    oldest: datetime | None = None


class KeyPage(Result):
    """Keys in the order of their queues. `after`: the queue after which the next page begins; None
    at the end, and for a task whose keys are hidden.
    """

    keys: list[Key] = Field(default_factory=list)
    after: str | None = None


async def keys_of(context: Context, name: str, after: str = "", limit: int = PAGE) -> KeyPage:
    """The keys of a task that have running or waiting runs. Raises UnknownTask, and
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
        found = await key_counts.counted(connection, name, [*{*waiting[name], *running}])
        queues = [each.queue for each in found]
        numbers = await turns.numbers_of(connection, queueing.limit, queues)
        is_hidden = name in await hidden_tasks(connection, context)
    keys = [
        Key(
            queue=HIDDEN if is_hidden else each.queue,
            key=HIDDEN if is_hidden else queueing.words_of(each.params),
            limit=numbers[each.queue],
            running=each.running,
            waiting=each.waiting,
            oldest=each.oldest,
        )
        for each in found[:limit]
    ]
    has_more = len(found) > limit and not is_hidden
    return KeyPage(keys=keys, after=keys[-1].queue if has_more else None)
