"""Calls the functions of limits: how many runs of each key whose runs wait may run at once.

The numbers are in the ledger, so that all nodes use the same, and no claim waits for a function.
Any node that has loaded a task may call its function; the ledger decides which one does.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_jsonable_python
from sqlalchemy.exc import DBAPIError

from batch_system import clock, failures
from batch_system.batch.ledger import database_time, limit_numbers
from batch_system.batch.ledger.limit_numbers import Answer
from batch_system.batch.ledger.tasks import SECRET_TAG
from batch_system.batch.nodes.ledger_poll import LedgerChanges
from batch_system.batch.nodes.outage import Outage
from batch_system.batch.queue import enqueue, key_queues
from batch_system.batch.tasks.base import BaseTask
from batch_system.batch.tasks.limit import MOST, Limit, is_number_of_runs
from batch_system.batch.tasks.registry import Task, TaskRegistry
from batch_system.concurrency.background import Background
from batch_system.concurrency.thread_pool import ThreadPool
from batch_system.database.engine import Database
from batch_system.errors import InvalidParameters
from batch_system.escaping import echoed
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

CALL_SECONDS = 5.0
"""How long a call may take."""
LOOK_SECONDS = 2.0
"""How often the ledger is asked for which keys functions have to be called."""
MOST_QUEUES = 500
"""For how many keys of a task functions are called in a turn. The next turn goes on behind them."""
AT_ONCE = 4
"""How many calls go on at once, if a function takes one value."""


class LimitFunctions(Background):
    """Looks after polls of the ledger that have found waiting runs."""

    turn_seconds = 60.0

    def __init__(
        self,
        ledger: Database,
        tasks: Mapping[str, Task],
        on_changed: Callable[[], None],
        outage: Outage,
    ) -> None:
        """`tasks`: those of this service, by name. `on_changed`: called when numbers were stored,
        so that runs may be able to start.
        """
        self._ledger = ledger
        self._tasks = tasks
        self._on_changed = on_changed
        self._outage = outage
        self._woken = asyncio.Event()
        self._threads: dict[str, ThreadPool] = defaultdict(lambda: ThreadPool(AT_ONCE))
        """Of each task, so that a function that hangs holds up no other task."""
        self._next = 0.0
        self._last: dict[str, str] = {}
        """The queue behind which the next turn begins, by task."""
        self._logged: dict[str, str | None] = {}
        """The error that was logged last, by task."""

    def on_changes(self, changes: LedgerChanges) -> None:
        """Take the result of a ledger poll."""
        if changes.is_claimable and clock.monotonic() >= self._next:
            self._woken.set()

    async def _loop(self) -> None:
        try:
            while True:
                await self._woken.wait()
                self._woken.clear()
                self._next = clock.monotonic() + LOOK_SECONDS
                await self.look()
        finally:
            self.close()

    def close(self) -> None:
        """End the threads as soon as their functions return."""
        for threads in self._threads.values():
            threads.close()

    async def look(self) -> None:
        """Call the functions for the keys whose runs wait, if their numbers are too old."""
        for name, task in list(self._tasks.items()):
            if task.policies.limit is not None and callable(task.policies.limit.number):
                await self._turn(name, task.policies.limit)

    async def _turn(self, name: str, limit: Limit) -> None:
        try:
            async with self.limited_turn():
                await self._ask(name, limit)
            self._outage.over_for(self.name)
        except Exception as error:  # the background loop's boundary
            if self._outage.cause_for(self.name, self._ledger, error) is None:
                logger.exception(f"the limit of task {name} was not asked; it is tried again")

    async def _ask(self, name: str, limit: Limit) -> None:
        first = {name: self._last.get(name, "")}
        async with self._ledger.reader.connect() as connection:
            queues = (await key_queues.behind(connection, first, MOST_QUEUES, retries=True))[name]
            now = await database_time.now_of(connection)
            due = await limit_numbers.due(connection, name, queues, now) if queues else {}
        self._last[name] = queues[-1] if len(queues) == MOST_QUEUES else ""
        value = self._tasks[name].queueing.default
        values = {
            queue: (params or {}).get(limit.key, value) for queue, params in sorted(due.items())
        }
        left, size = list(values.items()), MOST_QUEUES if limit.many else AT_ONCE
        while left and await self._ask_some(name, limit, dict(left[:size])):
            left = left[size:]

    async def _ask_some(self, name: str, limit: Limit, values: Mapping[str, Any]) -> bool:
        """Call the function for these queues. Returns False if all calls have failed."""
        async with self._ledger.engine.begin() as connection:
            now = await database_time.now_of(connection)
            own = await limit_numbers.mark(connection, name, values, now)
        asked = {queue: value for queue, value in values.items() if queue in own}
        if not asked:
            return True
        answers = await self._call(name, limit, asked)
        async with self._ledger.engine.begin() as connection:
            await limit_numbers.store(connection, name, answers, now)
        self._on_changed()
        errors = [each.error for each in answers if each.error is not None]
        if errors and errors[0] != self._logged.get(name):
            logger.warning(f"the function of the limit of task {name} failed: {errors[0]}")
        self._logged[name] = errors[0] if errors else None
        return len(errors) < len(answers)

    async def _call(self, name: str, limit: Limit, asked: Mapping[str, Any]) -> Sequence[Answer]:
        if not limit.many:
            outcomes = await asyncio.gather(
                *(self._outcome(name, limit, value) for value in asked.values())
            )
            return list(map(_answer, asked, outcomes))
        found = await self._outcome(name, limit, list(asked.values()))
        if not isinstance(found, _Failed | Mapping):
            found = _Failed(f"it returned {echoed(found)}; allowed: a mapping to numbers")
        if isinstance(found, _Failed):
            return [_answer(queue, found) for queue in asked]
        return [
            _answer(queue, found[value])
            if isinstance(value, Hashable) and value in found
            else Answer(queue, None)
            for queue, value in asked.items()
        ]

    async def _outcome(self, name: str, limit: Limit, value: Any) -> Any:
        """What the function returned; _Failed if it did not."""
        function = limit.number
        assert callable(function)
        try:
            async with asyncio.timeout(CALL_SECONDS) as within:
                if inspect.iscoroutinefunction(function):
                    return await function(value)
                return await self._threads[name].run(function, value)
        except Exception as error:  # noqa: BLE001 - an author's function may raise anything
            if within.expired():
                return _Failed(f"it took more than {CALL_SECONDS:g} seconds")
            # The message of an error may name a value of the key.
            is_secret = SECRET_TAG in self._tasks[name].tags
            return _Failed(type(error).__name__ if is_secret else failures.line_of(error))


@dataclass(frozen=True)
class _Failed:
    """A call that did not return anything of use."""

    why: str


def _answer(queue: str, outcome: object) -> Answer:
    if isinstance(outcome, _Failed):
        return Answer(queue, None, outcome.why)
    if is_number_of_runs(outcome):
        return Answer(queue, outcome)
    why = f"it returned {echoed(outcome)}; allowed: an int from 0 to {MOST:,}"
    return Answer(queue, None, why)


async def limit_changed(task: type[BaseTask], /, **key: Any) -> None:
    """Let the function of the task's limit be called soon for a value of its key, such as
    `await limit_changed(Mail, tenant="acme")`; otherwise it is called once a minute.

    It returns at once, and asks nothing if no runs of this value wait. Raises InvalidParameters for
    a task whose limit has no function, and for another parameter than that of the limit;
    DatabaseError if the ledger can't be reached.
    """
    its = TaskRegistry.of(task)
    limit = its.policies.limit
    if limit is None or not limit.is_dynamic:
        raise InvalidParameters(f"task {its.name} has no limit whose number a function returns")
    if list(key) != [limit.key]:
        raise InvalidParameters(
            f"limit_changed(): the parameter is {echoed(', '.join(key))}; allowed: {limit.key}"
        )
    ledger = enqueue.ledger()
    queue = limit.queue_of(its.name, to_jsonable_python(key[limit.key or ""]))
    try:
        async with ledger.engine.begin() as connection:
            now = await database_time.now_of(connection)
            await limit_numbers.ask_again(connection, queue, now)
    except (DBAPIError, OSError) as error:
        raise ledger.unreachable(error) from error
