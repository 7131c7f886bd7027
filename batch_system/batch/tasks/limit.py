"""The limit of a task: how many of its runs with the same value of one parameter run at once.

Runs with the same value are in one queue, whose lanes bound how many of them run at once. The name
of the queue is made when a run is made, and stays with it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batch_system.errors import InvalidTask
from batch_system.escaping import cut, echoed

MOST, MOST_TOTAL, MOST_BACKLOG = 1_000, 10_000, 1_000_000
LONGEST_VALUE = 60
"""The characters of a value that a sentence shows."""
LONGEST_QUEUE = 120
"""The characters that the name of a queue may have."""
_PLAIN = re.compile(r"[\w .:@+/-]{1,60}", re.ASCII)
"""Values that stand in the name of a queue as they are. Others are hashed there."""
_NAME = re.compile(r"[a-z0-9_.-]{1,100}")


@dataclass(frozen=True)
class Limit:
    """How many runs may run at once, on all nodes together.

    Attributes:
      number: The number, from 1 to 1,000.
      key: The name of a parameter of `run`. The limit then holds for each value of it, and values
          take turns. None: it holds for all runs together.
      name: Tasks whose limits have the same name share it. None: the limit is that of the task.
      total: How many runs of all keys together may run at once; None: as many as the keys allow.
      backlog: How many runs of a key may wait; further starts are refused with TooManyWaiting.
          Slots and retries never are. Starters at the same moment may exceed it by a few.
    """

    number: int
    key: str | None = None
    name: str | None = None
    total: int | None = None
    backlog: int | None = None

    def __post_init__(self) -> None:
        is_int = isinstance(self.number, int) and not isinstance(self.number, bool)
        if not is_int or not 1 <= self.number <= MOST:
            raise InvalidTask(
                f"Limit(number) is {echoed(self.number)}; allowed: an int from 1 to {MOST:,}"
            )
        if self.total is not None and not (
            type(self.total) is int and 1 <= self.total <= MOST_TOTAL
        ):
            raise InvalidTask(
                f"Limit(total) is {echoed(self.total)}; allowed: an int from 1 to {MOST_TOTAL:,}, "
                "or None"
            )
        if self.backlog is not None and not (
            type(self.backlog) is int and 1 <= self.backlog <= MOST_BACKLOG
        ):
            raise InvalidTask(
                f"Limit(backlog) is {echoed(self.backlog)}; allowed: an int from 1 to "
                f"{MOST_BACKLOG:,}, or None"
            )
        if self.key is not None and not (isinstance(self.key, str) and self.key.isidentifier()):
            raise InvalidTask(
                f"Limit(key) is {echoed(self.key)}; allowed: the name of a parameter of run()"
            )
        if self.name is not None and not (
            isinstance(self.name, str) and _NAME.fullmatch(self.name)
        ):
            raise InvalidTask(
                f"Limit(name) is {echoed(self.name)}; allowed: 1 to 100 characters of a-z 0-9 _ . -"
            )

    def queue_of(self, task: str, value: object) -> str:
        """The name of the queue of a run of `task`. `value`: the JSON value of the parameter `key`;
        it has no meaning without `key`.
        """
        head = f"{self.name or task}["
        if self.key is None:
            return f"{head}]"[:LONGEST_QUEUE]
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        queue = f"{head}{self.key}={text}]"
        if _PLAIN.fullmatch(text) and len(queue) <= LONGEST_QUEUE:
            return queue
        digest = hashlib.sha256(f"{self.key}={text}".encode()).hexdigest()
        return f"{head}#{digest[: LONGEST_QUEUE - len(head) - 2]}]"


@dataclass(frozen=True)
class Queueing:
    """In which queue a run of a task is, by its parameters.

    Attributes:
      task: The name of the task.
      exclusive: The queue of all its runs, if it has no limit; None: they are in no queue.
      limit: Its limit; None if it has none.
      default: The JSON value of the limit's parameter for runs that do not give it.
    """

    task: str
    exclusive: str | None
    limit: Limit | None = None
    default: Any = None

    @classmethod
    def of_json(cls, task: str, values: Mapping[str, Any]) -> Queueing:
        """The queueing that another process has described by its fields. Raises KeyError,
        TypeError or ValueError if the values are none.
        """
        exclusive = values["exclusive"]
        if exclusive is not None and not isinstance(exclusive, str):
            raise ValueError(f"exclusive is {exclusive!r}")
        limit = values["limit"]
        return cls(task, exclusive, None if limit is None else Limit(**limit), values["default"])

    @classmethod
    def of_policies(cls, task: str, policies: Mapping[str, Any]) -> Queueing:
        """The queueing of a task that only other processes have loaded, by the policies that the
        ledger stores.
        """
        if isinstance(limit := policies.get("limit"), Mapping):
            its = Limit(
                limit["number"], *(limit.get(name) for name in ("key", "name", "total", "backlog"))
            )
            return cls(task, None, its, limit.get("default"))
        is_unlimited = policies.get("overlap") == "allow" and policies.get("max_running") is None
        return cls(task, None if is_unlimited else task)

    @property
    def prefix(self) -> str:
        """How the names of the queues of its limit begin."""
        return f"{(self.limit.name if self.limit is not None else None) or self.task}["

    def words_of(self, params: Mapping[str, Any] | None) -> str:
        """Whose limit it is, such as "tenant=acme"; the name of the task without a key."""
        if self.limit is None or self.limit.key is None:
            return (self.limit.name if self.limit is not None else None) or self.task
        value = (params or {}).get(self.limit.key, self.default)
        return f"{self.limit.key}={cut(str(value), LONGEST_VALUE)}"

    def of(self, params: Mapping[str, Any] | None) -> str | None:
        """The queue of a run with these parameters, as the ledger stores them."""
        if self.limit is None:
            return self.exclusive
        key = self.limit.key
        value = None if key is None else (params or {}).get(key, self.default)
        return self.limit.queue_of(self.task, value)
