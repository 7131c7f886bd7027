"""The policies of a task: retry, missed slots, overlap, timeout and limits, with their checks."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, Literal, get_args

from pydantic import ByteSize, TypeAdapter, ValidationError

from service.errors import InvalidTask
from service.escaping import echoed
from service.settings.pools import DEFAULT_POOL, POOL_NAME, POOL_NAME_ALLOWED

MissedPolicy = Literal["skip", "once", "all"]
OverlapPolicy = Literal["skip", "wait", "allow", "replace"]

MISSED = get_args(MissedPolicy)
OVERLAP = get_args(OverlapPolicy)
MOST_RUNNING = 1_000
MOST_WAITING = 1_000
MOST_TAGS = 20
LEAST_MEMORY, MOST_MEMORY = 16 * 2**20, 2**50
"""Bounds of `memory`, in bytes: a child process with less can't import anything."""
ON_TIME = timedelta(minutes=1)
"""A slot that is handled less than this late still runs as on time; from this on it is a misfire.
"""
NAME = re.compile(r"[a-z0-9_.-]{1,100}")
"""What the name of a task, or a tag, looks like."""
LONGEST = timedelta(days=36_500)
"""Upper bound of durations: adding a longer one to a datetime could exceed the year 9999."""


@dataclass(frozen=True)
class Retry:
    """How often a failed run is tried again, and after which waits.

    Attributes:
        attempts: The number of attempts with the first one; 1 means no retry.
        wait: The seconds before the second attempt.
        factor: Each further wait is this many times as long.
        max_wait: Upper bound of a wait in seconds.
        jitter: Each wait is longer or shorter by a random share of at most this.
        on: Only these exceptions, and a RetryAfter, lead to another attempt.
    """

    attempts: int
    wait: float
    factor: float
    max_wait: float
    jitter: float
    on: tuple[type[BaseException], ...]

    def __init__(
        self,
        attempts: int = 1,
        wait: float | timedelta = 30.0,
        factor: float = 2.0,
        max_wait: float | timedelta = 3600.0,
        jitter: float = 0.1,
        on: type[BaseException] | Collection[type[BaseException]] = Exception,
    ) -> None:
        """Times are seconds or a timedelta. Raises InvalidTask, which names the argument and what
        is allowed.
        """
        vars(self).update(
            attempts=attempts,
            wait=_seconds(wait),
            factor=factor,
            max_wait=_seconds(max_wait),
            jitter=jitter,
            on=tuple(on)
            if isinstance(on, list | set | frozenset)
            else (on,)
            if isinstance(on, type)
            else on,
        )
        check(_is_int(self.attempts, 1), "Retry(attempts)", self.attempts, "an int from 1")
        check(_is_number(self.wait, 0), "Retry(wait)", self.wait, "seconds from 0, up to 100 years")
        check(_is_number(self.factor, 1), "Retry(factor)", self.factor, "a number from 1")
        check(
            _is_number(self.max_wait, 0),
            "Retry(max_wait)",
            self.max_wait,
            "seconds from 0, up to 100 years",
        )
        check(
            _is_number(self.jitter, 0) and self.jitter <= 1,
            "Retry(jitter)",
            self.jitter,
            "a share from 0 to 1",
        )
        valid = isinstance(self.on, tuple) and all(
            isinstance(t, type) and issubclass(t, BaseException) for t in self.on
        )
        check(valid, "Retry(on)", self.on, "an exception class, or a tuple of exception classes")

    def seconds_before(self, attempt: int, asked: float | None = None) -> float:
        """The seconds to wait before attempt number `attempt`, where 2 is the first retry.

        `asked`: the seconds that the error itself asks for. They replace the wait of the policy,
        without jitter.
        """
        if asked is not None:
            return min(self.max_wait, max(0.0, asked))
        try:
            base = min(self.max_wait, self.wait * float(self.factor) ** (attempt - 2))
        except OverflowError:
            base = self.max_wait if self.wait else 0.0
        # Spreads load, protects no secret.
        spread = 1 + self.jitter * random.uniform(-1, 1)  # noqa: S311
        return min(self.max_wait, base * spread)


@dataclass(frozen=True)
class Missed:
    """What happens to slots that came due while no service ran.

    `skip`: none of them runs. `once`: only the newest one runs. `all`: each runs, oldest first.
    Slots older than `max_age` never run, nor with `all` any but the newest `max_count`. Slots that
    do not run are recorded as a missed range.
    """

    policy: MissedPolicy = "once"
    max_age: timedelta = timedelta(days=1)
    max_count: int | None = None

    def __post_init__(self) -> None:
        check(self.policy in MISSED, "Missed", self.policy, _one_of(MISSED))
        valid = isinstance(self.max_age, timedelta) and timedelta(0) < self.max_age <= LONGEST
        check(
            valid,
            "Missed(max_age)",
            self.max_age,
            f"a timedelta above zero, up to {LONGEST.days:,} days",
        )
        valid = self.max_count is None or _is_int(self.max_count, 1)
        check(valid, "Missed(max_count)", self.max_count, "an int from 1, or None for no limit")


@dataclass(frozen=True)
class Policies:
    """The policies of a task as they were checked. Times are in seconds, `memory` is in bytes."""

    timeout: float | None
    retry: Retry
    overlap: str
    missed: Missed
    priority: int
    max_running: int | None = None
    max_waiting: int = 1
    fenced: bool = True
    rerun: bool = True
    pool: str = DEFAULT_POOL
    memory: int | None = None

    @classmethod
    def of(cls, task: type[Any]) -> Policies:
        """Read and check the class attributes. Raises InvalidTask naming the attribute and what is
        allowed.
        """
        timeout = _seconds(task.timeout)
        valid = timeout is None or (_is_number(timeout, 0) and timeout > 0)
        check(
            valid,
            "timeout",
            task.timeout,
            "seconds above 0 (up to 100 years), a timedelta, or None",
        )
        check(isinstance(task.retry, Retry), "retry", task.retry, "a Retry(…)")
        missed = Missed(task.missed) if task.missed in MISSED else task.missed
        check(isinstance(missed, Missed), "missed", missed, f"a Missed(…) or {_one_of(MISSED)}")
        valid = _is_int(task.priority, -1000) and task.priority <= 1000
        check(valid, "priority", task.priority, "an int from -1000 to 1000 (larger goes first)")
        _check_overlap(task)
        check(isinstance(task.fenced, bool), "fenced", task.fenced, "True or False")
        check(isinstance(task.rerun, bool), "rerun", task.rerun, "True or False")
        valid = isinstance(task.pool, str) and POOL_NAME.fullmatch(task.pool) is not None
        check(valid, "pool", task.pool, f"{POOL_NAME_ALLOWED}")
        return cls(
            timeout,
            task.retry,
            task.overlap,
            missed,
            task.priority,
            task.max_running,
            task.max_waiting,
            task.fenced,
            task.rerun,
            task.pool,
            _bytes_of(task.memory),
        )

    def as_json(self) -> dict[str, Any]:
        """The policies as the ledger stores them. Exception classes are their names, and times are
        seconds.
        """
        retry = {**fields_of(self.retry), "on": [t.__qualname__ for t in self.retry.on]}
        missed = {**fields_of(self.missed), "max_age": self.missed.max_age.total_seconds()}
        return {**fields_of(self), "retry": retry, "missed": missed}


def fields_of(declared: Any) -> dict[str, Any]:
    """The values of a dataclass by name. Unlike `asdict` it copies none of them, which would take
    much longer.
    """
    return {field.name: getattr(declared, field.name) for field in fields(declared)}


def _bytes_of(memory: object) -> int | None:
    """The bytes that `memory` means. Raises InvalidTask."""
    if memory is None:
        return None
    try:
        size = (
            int(TypeAdapter(ByteSize).validate_python(memory)) if type(memory) in (int, str) else 0
        )
    except ValidationError:
        size = 0
    allowed = "a size from 16 MiB to 1 PiB, such as '2 GiB', a number of bytes, or None"
    check(LEAST_MEMORY <= size <= MOST_MEMORY, "memory", memory, allowed)
    return size


def _check_overlap(task: type[Any]) -> None:
    check(task.overlap in OVERLAP, "overlap", task.overlap, _one_of(OVERLAP))
    running, waiting = task.max_running, task.max_waiting
    valid = running is None or (_is_int(running, 1) and running <= MOST_RUNNING)
    check(valid, "max_running", running, f"an int from 1 to {MOST_RUNNING:,}, or None")
    contradicts = running == 1 and task.overlap == "allow"
    check(not contradicts, "max_running", running, "None, or an int from 2, with overlap = 'allow'")
    valid = _is_int(waiting, 1) and waiting <= MOST_WAITING
    check(valid, "max_waiting", waiting, f"an int from 1 to {MOST_WAITING:,}")
    check(
        waiting == 1 or task.overlap == "wait", "max_waiting", waiting, "1, unless overlap = 'wait'"
    )


def tags_of(task: type[Any]) -> tuple[str, ...]:
    """The tags of a task class, each once. Raises InvalidTask."""
    tags: Any = task.tags
    valid = isinstance(tags, tuple | list) and len(tags) <= MOST_TAGS
    valid = valid and all(isinstance(tag, str) and NAME.fullmatch(tag) for tag in tags)
    check(valid, "tags", tags, f"a tuple of at most {MOST_TAGS} names of a-z 0-9 _ . -")
    return tuple(dict.fromkeys(tags))


def not_run_again(reason: str) -> str:
    """The reason with which a run of a task with `rerun = False` fails, where other runs would be
    interrupted.
    """
    return f"{reason} while it ran, and it is not run again (rerun = False)"


def check(valid: bool, name: str, value: object, allowed: str) -> None:
    """Raise InvalidTask, which names the attribute and what is allowed, unless `valid`."""
    if not valid:
        raise InvalidTask(f"{name} is {echoed(value)}; allowed: {allowed}")


def _seconds(time: Any) -> Any:
    return time.total_seconds() if isinstance(time, timedelta) else time


def _is_number(value: object, least: float) -> bool:
    longest = LONGEST.total_seconds()
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= longest
    )


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _one_of(names: Iterable[str]) -> str:
    return " | ".join(repr(name) for name in names)
