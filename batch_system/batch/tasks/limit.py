"""The limit of a task: how many of its runs with the same value of one parameter run at once.

Runs with the same value are in one queue, whose lanes bound how many of them run at once. The name
of the queue is made when a run is made, and stays with it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeGuard

from batch_system.errors import InvalidTask
from batch_system.escaping import cut, echoed

MOST, MOST_TOTAL, MOST_BACKLOG = 1_000, 10_000, 1_000_000
LONGEST_PERIOD = 31 * 86_400
"""The seconds of the longest period of a rate."""
LONGEST_VALUE = 60
"""The characters of a value that a sentence shows."""
LONGEST_QUEUE = 120
"""The characters that the name of a queue may have."""
_PLAIN = re.compile(r"[\w .:@+/-]{1,60}", re.ASCII)
"""Values that stand in the name of a queue as they are. Others are hashed there."""
_NAME = re.compile(r"[a-z0-9_.-]{1,100}")


Function = Callable[[Any], Any]


def is_number_of_runs(value: object) -> TypeGuard[int]:
    """Whether a limit can be this number."""
    return type(value) is int and 0 <= value <= MOST


def _check_names(owner: str, key: object, name: object) -> None:
    if key is not None and not (isinstance(key, str) and key.isidentifier()):
        raise InvalidTask(
            f"{owner}(key) is {echoed(key)}; allowed: the name of a parameter of run()"
        )
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise InvalidTask(
            f"{owner}(name) is {echoed(name)}; allowed: 1 to 100 characters of a-z 0-9 _ . -"
        )


@dataclass(frozen=True)
class Limit:
    """How many runs may run at once, on all nodes together.

    Attributes:
      number: The number, from 1 to 1,000; or a function that returns it for a value of `key`, from
          0 to 1,000 (0: none may run now). A node calls it for each value whose runs wait, once a
          minute and after `limit_changed`, with the JSON value and for at most 5 seconds. It may
          be a coroutine function; others are called in a thread. If it fails, the number that it
          returned last holds.
      key: The name of a parameter of `run`. The limit then holds for each value of it, and values
          take turns. None: it holds for all runs together.
      name: Tasks whose limits have the same name share it. None: the limit is that of the task.
      total: How many runs of all keys together may run at once; None: as many as the keys allow.
      backlog: How many runs of a key may wait; further starts are refused with TooManyWaiting.
          Slots and retries never are. Starters at the same moment may exceed it by a few.
      default: The number for a value for which the function has not returned one yet.
      many: Whether the function takes a list of values, and returns a mapping from each of them to
          its number. A value that is missing there gets `default`.
    """

    number: int | Function
    key: str | None = None
    name: str | None = None
    total: int | None = None
    backlog: int | None = None
    default: int | None = None
    many: bool = False

    def __post_init__(self) -> None:
        if callable(self.number):
            if self.key is None:
                raise InvalidTask("Limit(number) is a function; allowed: with a key")
            if not is_number_of_runs(self.default):
                raise InvalidTask(
                    f"Limit(default) is {echoed(self.default)}; allowed: an int from 0 to "
                    f"{MOST:,}, which holds until the function has returned a number"
                )
        elif not is_number_of_runs(self.number) or self.number == 0 != self.default:
            raise InvalidTask(
                f"Limit(number) is {echoed(self.number)}; allowed: an int from 1 to {MOST:,}, or "
                "a function"
            )
        elif self.default not in (None, self.number):
            raise InvalidTask(
                f"Limit(default) is {echoed(self.default)}; allowed: only with a function"
            )
        if not isinstance(self.many, bool):
            raise InvalidTask(f"Limit(many) is {echoed(self.many)}; allowed: True or False")
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
        _check_names("Limit", self.key, self.name)

    @property
    def is_dynamic(self) -> bool:
        """Whether a function says how many runs of a key may run. The ledger has its numbers."""
        return self.default is not None

    @property
    def usual(self) -> int:
        """How many runs may run at once if the ledger has no other number for the key."""
        return self.number if isinstance(self.number, int) else self.default or 0

    @property
    def plain(self) -> Limit:
        """The limit without its function, as other processes know it."""
        return replace(self, number=self.usual, many=False) if self.is_dynamic else self

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


@dataclass(frozen=True, init=False)
class Rate:
    """How many runs may begin within a period, on all nodes together. It holds exactly: in no
    period of this length more runs begin. A retry counts as a beginning; a run that goes on after
    an interruption does not.

    Attributes:
      number: The number, from 1 to 1,000.
      per: The length of the period in seconds, up to 31 days. A timedelta may be given.
      key: The name of a parameter of `run`, which is also that of the task's `limit`, if it has
          one. The rate then holds for each value of it. None: it holds for all runs together.
      name: Tasks whose rates have the same name share it. None: the rate is that of the task.
    """

    number: int
    per: float
    key: str | None
    name: str | None

    def __init__(
        self,
        number: int,
        per: float | timedelta,
        key: str | None = None,
        name: str | None = None,
    ) -> None:
        """Raises InvalidTask, which names the argument and what is allowed."""
        if type(number) is not int or not 1 <= number <= MOST:
            raise InvalidTask(
                f"Rate(number) is {echoed(number)}; allowed: an int from 1 to {MOST:,}"
            )
        seconds = per.total_seconds() if isinstance(per, timedelta) else per
        if type(seconds) not in (int, float) or not 0 < seconds <= LONGEST_PERIOD:
            raise InvalidTask(
                f"Rate(per) is {echoed(per)}; allowed: seconds above 0 (up to 31 days), or a "
                "timedelta"
            )
        _check_names("Rate", key, name)
        values = {"number": number, "per": float(seconds), "key": key, "name": name}
        for field, value in values.items():
            object.__setattr__(self, field, value)

    def check_with(self, limit: Limit) -> None:
        """Raise InvalidTask if a run's queue, which the limit names, does not say whose rate it
        is.
        """
        if self.key is None:
            return
        for field in ("key", "name"):
            own, its = getattr(self, field), getattr(limit, field)
            if own != its:
                raise InvalidTask(
                    f"Rate({field}) is {echoed(own)}; allowed: {echoed(its)}, as in the Limit of "
                    "the task, or a Rate without a key"
                )


@dataclass(frozen=True)
class Queueing:
    """In which queue a run of a task is, by its parameters.

    Attributes:
      task: The name of the task.
      exclusive: The queue of all its runs, if it has no limit; None: they are in no queue.
      limit: Its limit; None if it has none.
      default: The JSON value of the limit's parameter for runs that do not give it.
      rate: Its rate; None if it has none.
    """

    task: str
    exclusive: str | None
    limit: Limit | None = None
    default: Any = None
    rate: Rate | None = None

    @classmethod
    def of_json(cls, task: str, values: Mapping[str, Any]) -> Queueing:
        """The queueing that another process has described by its fields. Raises KeyError,
        TypeError or ValueError if the values are none.
        """
        exclusive = values["exclusive"]
        if exclusive is not None and not isinstance(exclusive, str):
            raise ValueError(f"exclusive is {exclusive!r}")
        limit, rate = values["limit"], values["rate"]
        return cls(
            task,
            exclusive,
            None if limit is None else Limit(**limit),
            values["default"],
            None if rate is None else Rate(**rate),
        )

    @classmethod
    def of_policies(cls, task: str, policies: Mapping[str, Any]) -> Queueing:
        """The queueing of a task that only other processes have loaded, by the policies that the
        ledger stores.
        """
        if isinstance(limit := policies.get("limit"), Mapping):
            names = ("number", "key", "name", "total", "backlog", "default")
            known: dict[str, Any] = {name: limit.get(name) for name in names}
            its = Limit(**known)
            rate = policies.get("rate")
            its_rate = Rate(**rate) if isinstance(rate, Mapping) else None
            return cls(task, None, its, limit.get("value"), its_rate)
        is_unlimited = policies.get("overlap") == "allow" and policies.get("max_running") is None
        return cls(task, None if is_unlimited else task)

    @property
    def backlog(self) -> int | None:
        """How many runs of a key may wait; None: any number."""
        return self.limit.backlog if self.limit is not None else None

    @property
    def shared_name(self) -> str:
        """The name of its limit, which tasks may share; that of the task, if it gives none."""
        return (self.limit.name if self.limit is not None else None) or self.task

    @property
    def prefix(self) -> str:
        """How the names of the queues of its limit begin."""
        return f"{self.shared_name}["

    @property
    def has_one_bucket(self) -> bool:
        """Whether it has a rate that holds for all its runs together."""
        return self.rate is not None and self.rate.key is None

    def bucket_of(self, queue: str) -> str:
        """Whose rate it is that the runs of this queue count for."""
        assert self.rate is not None
        return queue if self.rate.key is not None else f"{self.rate.name or self.task}[]"

    def words_of(self, params: Mapping[str, Any] | None) -> str:
        """Whose limit it is, such as "tenant=acme"; the name of the task without a key."""
        if self.limit is None or self.limit.key is None:
            return self.shared_name
        value = (params or {}).get(self.limit.key, self.default)
        return f"{self.limit.key}={cut(str(value), LONGEST_VALUE)}"

    def of(self, params: Mapping[str, Any] | None) -> str | None:
        """The queue of a run with these parameters, as the ledger stores them."""
        if self.limit is None:
            return self.exclusive
        key = self.limit.key
        value = None if key is None else (params or {}).get(key, self.default)
        return self.limit.queue_of(self.task, value)
