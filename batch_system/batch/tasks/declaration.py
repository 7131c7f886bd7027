"""The attributes that a task declares in its class: its policies, its monitoring and its name. Each
value is checked where it is read, with an error that names the attribute and what is allowed.

A new attribute of a task is added to BaseTask, with its default, and here, as a field of Policies
or Monitoring with its check.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields
from datetime import time, timedelta
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import ByteSize, TypeAdapter, ValidationError

from batch_system import failures
from batch_system.batch.tasks import limit as limits
from batch_system.batch.tasks.limit import Limit, Rate
from batch_system.errors import BatchError, InvalidTask
from batch_system.escaping import echoed
from batch_system.settings.pools import DEFAULT_POOL, POOL_NAME, POOL_NAME_ALLOWED

MissedPolicy = Literal["skip", "once", "all"]
OverlapPolicy = Literal["skip", "wait", "allow", "replace"]

MISSED = get_args(MissedPolicy)
OVERLAP = get_args(OverlapPolicy)
MOST_RUNNING = 1_000
MOST_WAITING = 1_000
MOST_TAGS = 20
LEAST_MEMORY, MOST_MEMORY = 16 * 2**20, 2**50
"""Bounds of `memory`, in bytes. A child process with less can't import anything."""
ON_TIME = timedelta(minutes=1)
"""A slot that is handled less than this late still counts as on time; otherwise it is a misfire."""
NAME = re.compile(r"[a-z0-9_.-]{1,100}")
"""The pattern for names of tasks, and for tags."""
LONGEST = timedelta(days=36_500)
"""The longest duration. Adding a longer one to a datetime could exceed the year 9999."""
MOST_CHANNELS = 10
LONGEST_OWNER = 200
LONGEST_URL = 2_000

_TIME = re.compile(r"([01]\d|2[0-3]):([0-5]\d)")

Expect = Callable[[Any], Any]


@dataclass(frozen=True)
class Retry:
    """How often a failed run is tried again, and after which waits.

    Attributes:
      attempts: The number of attempts including the first one; 1 means no retry.
      wait: The seconds before the second attempt.
      factor: Each further wait is this many times as long.
      max_wait: The longest wait in seconds.
      jitter: Each wait is longer or shorter by a random share of up to this value.
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

        `asked`: the seconds that the error asks for. They replace the wait of the policy, without
        jitter.
        """
        if asked is not None:
            return min(self.max_wait, max(0.0, asked))
        try:
            base = min(self.max_wait, self.wait * float(self.factor) ** (attempt - 2))
        except OverflowError:
            base = self.max_wait if self.wait else 0.0
        # Spreads load; it protects no secret.
        spread = 1 + self.jitter * random.uniform(-1, 1)  # noqa: S311
        return min(self.max_wait, base * spread)


@dataclass(frozen=True)
class Missed:
    """What happens to slots that came due while no service ran.

    `skip`: none of them runs. `once`: only the newest one runs. `all`: each runs, oldest first.
    Slots older than `max_age` never run, and with `all` only the newest `max_count` run. Slots that
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
    """The checked policies of a task. Times are in seconds, `memory` is in bytes."""

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
    limit: Limit | None = None
    rate: Rate | None = None

    @classmethod
    def of(cls, task: type[Any]) -> Policies:
        """Read and check the class attributes. Raises InvalidTask, which names the attribute and
        what is allowed.
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
        given = {field.name: getattr(task, field.name) for field in fields(cls)}
        checked = {"timeout": timeout, "missed": missed, "memory": _bytes_of(task.memory)}
        if task.limit is not None or task.rate is not None:
            checked["overlap"] = "allow"
        if task.rate is not None and task.limit is None:
            checked["limit"] = Limit(limits.MOST, task.rate.key, task.rate.name)
        return cls(**given | checked)

    def as_json(self) -> dict[str, Any]:
        """The policies as the ledger stores them. Exception classes become their names, and times
        become seconds.
        """
        retry = {**fields_of(self.retry), "on": [t.__qualname__ for t in self.retry.on]}
        missed = {**fields_of(self.missed), "max_age": self.missed.max_age.total_seconds()}
        values = {**fields_of(self), "retry": retry, "missed": missed}
        limit, rate = values.pop("limit"), values.pop("rate")
        values |= {} if limit is None else {"limit": fields_of(limit.plain)}
        return values if rate is None else {**values, "rate": fields_of(rate)}


@dataclass(frozen=True)
class Alerts:
    """When incidents of a task are sent, and to whom. Values that are None follow the settings of
    the service.

    Attributes:
      after_failures: Send the incident of an error only when this many runs have failed with it.
      close_after: Close an incident of an error only when this many runs in a row have succeeded
          after it.
      late_after: A slot whose run has not started after this many seconds is late.
      slow_after: A run that takes more than this many seconds is slow.
      stalled_after: A run whose progress has not changed for this many seconds is slow.
      at_risk: Open an incident as soon as the forecast says that a slot will miss the `deadline`
          of the task, or may miss it.
      to: The names of the channels to use, instead of the channels for all tasks.
      quiet: A time of day in the zone of the task, such as "22:00-07:00", in which nothing is
          sent. An incident that opens in it, and is still open at its end, is sent then.
    """

    after_failures: int
    close_after: int
    late_after: float | None
    slow_after: float | None
    stalled_after: float | None
    to: tuple[str, ...]
    quiet: str | None
    at_risk: bool

    def __init__(
        self,
        after_failures: int = 1,
        close_after: int = 1,
        late_after: float | timedelta | None = None,
        slow_after: float | timedelta | None = None,
        stalled_after: float | timedelta | None = None,
        to: str | tuple[str, ...] | list[str] = (),
        quiet: str | None = None,
        at_risk: bool = False,
    ) -> None:
        """Times are seconds or a timedelta. Raises InvalidTask, which names the argument and what
        is allowed.
        """
        names = (to,) if isinstance(to, str) else tuple(to) if isinstance(to, tuple | list) else to
        vars(self).update(
            after_failures=after_failures,
            close_after=close_after,
            late_after=_checked_seconds("Alerts(late_after)", late_after),
            slow_after=_checked_seconds("Alerts(slow_after)", slow_after),
            stalled_after=_checked_seconds("Alerts(stalled_after)", stalled_after),
            to=names,
            quiet=quiet,
            at_risk=at_risk,
        )
        for name in ("after_failures", "close_after"):
            value = getattr(self, name)
            valid = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1_000
            check(valid, f"Alerts({name})", value, "an int from 1 to 1,000")
        valid = isinstance(names, tuple) and len(names) <= MOST_CHANNELS
        valid = valid and all(isinstance(name, str) and NAME.fullmatch(name) for name in names)
        check(valid, "Alerts(to)", to, f"a tuple of at most {MOST_CHANNELS} names of a-z 0-9 _ . -")
        valid = quiet is None or (isinstance(quiet, str) and quiet_hours(quiet) is not None)
        check(
            valid,
            "Alerts(quiet)",
            quiet,
            "two different times of day, such as '22:00-07:00', or None",
        )
        check(isinstance(at_risk, bool), "Alerts(at_risk)", at_risk, "True or False")


@dataclass(frozen=True)
class Monitoring:
    """The checked declarations of a task about its monitoring. Times are in seconds.

    Attributes:
      deadline: The time of day ("06:00") or the seconds after a slot until which the slot must
          have succeeded.
      expects: Whether the task has an `expect`, which checks the results of its runs.
      each_slot_counts: Whether only a success of the same slot makes a failed slot good.
      ping: The address that is called when a run begins and ends. It is a secret, so the ledger
          does not store it.
    """

    owner: str | None
    runbook: str | None
    alerts: Alerts
    deadline: str | float | None
    expect_every: float | None
    expects: bool
    each_slot_counts: bool
    ping: str | None = None

    @classmethod
    def of(cls, task: type[Any], takes_slot: bool) -> Monitoring:
        """Read and check the class attributes. Raises InvalidTask, which names the attribute and
        what is allowed.

        `takes_slot`: whether `run` has a parameter `slot`. By default, each slot is work of its own
        then.
        """
        check(isinstance(task.alerts, Alerts), "alerts", task.alerts, "an Alerts(…)")
        counts = task.each_slot_counts
        check(
            counts is None or isinstance(counts, bool),
            "each_slot_counts",
            counts,
            "True, False or None",
        )
        deadline = _deadline_of(task)
        valid = deadline is not None or not task.alerts.at_risk
        check(valid, "Alerts(at_risk)", True, "False for a task without a `deadline`")
        return cls(
            owner=_owner_of(task),
            runbook=_url("runbook", task.runbook),
            alerts=task.alerts,
            deadline=deadline,
            expect_every=_checked_seconds("expect_every", task.expect_every),
            expects=expect_of(task) is not None,
            each_slot_counts=takes_slot if counts is None else counts,
            ping=_url("ping", task.ping),
        )

    def as_json(self) -> dict[str, Any]:
        """The values as the ledger stores them, for processes that have not loaded the task."""
        values = {**fields_of(self), "alerts": fields_of(self.alerts)}
        return {name: value for name, value in values.items() if name != "ping"}


MONITORING = (
    "expect",
    *(field.name for field in fields(Monitoring) if field.name != "expects"),
)
"""The attributes of a class that are about its monitoring."""
POLICIES = tuple(field.name for field in fields(Policies))
"""The attributes of a class that are policies."""
OF_THE_CLASS = {*POLICIES, *MONITORING, "after", "except_on", "tags"}
"""Attributes that are read from the class, so that setting them on an instance would have no
effect.
"""


def one_line(error: BaseException) -> str:
    """The first line of an error in an author's code."""
    text = (
        error.message
        if isinstance(error, BatchError)
        else f"{type(error).__name__}: {failures.message_of(error)}"
    )
    return text.split("\n")[0]


def refuse_abstract(cls: type[Any]) -> None:
    """Raises InvalidTask if the class can't be a task, because something required is missing."""
    missing = sorted(cls.__abstractmethods__)
    if "run" in missing or not callable(cls.run):
        raise InvalidTask("it has no run(): write `async def run(self)` or `def run(self)`")
    if missing:
        raise InvalidTask(f"it is abstract: {', '.join(missing)} is missing")


def instance(cls: type[Any]) -> Any:
    """A new instance. Raises InvalidTask if it can't be made, or sets an attribute that is read
    from the class.
    """
    try:
        task = cls()
    except (Exception, SystemExit) as error:
        raise InvalidTask(
            f"it can't be instantiated without arguments: {one_line(error)}"
        ) from error
    ignored = sorted(vars(task).keys() & OF_THE_CLASS)
    if ignored:
        raise InvalidTask(
            f"{', '.join(ignored)} is set on the instance; allowed: a class attribute"
        )
    return task


def name_of(task: Any) -> str:
    """The name of the task. Raises InvalidTask."""
    name = attribute(task, "name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        hint = (
            "; the name of a class that is only a base class must begin with an underscore"
            if name is None
            else ""
        )
        value = "missing" if name is None else echoed(name)
        raise InvalidTask(f"name is {value}; allowed: 1 to 100 of a-z 0-9 _ . -{hint}")
    return name


def description_of(task: Any) -> str:
    """The attribute, or the first line of the class's own docstring."""
    description = attribute(task, "description")
    if not isinstance(description, str | None):
        raise InvalidTask(f"description is {echoed(description)}; allowed: a string")
    docstring = inspect.getdoc(type(task)) if type(task).__doc__ else None
    return description or (docstring or "").split("\n")[0]


def attribute(task: Any, name: str) -> Any:
    """The value of a class attribute or property, or None if it is missing. Raises InvalidTask if
    the property raises.

    `getattr` with a default would mistake an AttributeError inside the property for a missing
    attribute.
    """
    if name not in vars(task) and static(type(task), name) is None:
        return None
    try:
        return getattr(task, name)
    except (Exception, SystemExit) as error:
        raise InvalidTask(f"{name} can't be read: {one_line(error)}") from error


def static(cls: type[Any], name: str) -> Any:
    """The value of this name in the class, or in one of its bases; None if there is none. No
    property is read.
    """
    for base in cls.__mro__:
        if name in base.__dict__:
            return base.__dict__[name]
    return None


def expect_of(task: type[Any]) -> Expect | None:
    """The function `expect` of a task class, which gets the result of a run. Raises InvalidTask.

    It is read from the class, so that a lambda there gets the result and not an instance.
    """
    expect = inspect.getattr_static(task, "expect", None)
    if isinstance(expect, staticmethod):
        expect = expect.__func__
    if expect is None:
        return None
    allowed = (
        "a function of one argument, the result of a run, such as `lambda result: result['rows'] "
        "> 0`"
    )
    check(callable(expect) and not inspect.iscoroutinefunction(expect), "expect", expect, allowed)
    try:
        inspect.signature(expect).bind(None)
    except TypeError as error:
        raise InvalidTask(
            f"expect can't be called with the result of a run ({error}); allowed: {allowed}"
        ) from None
    except ValueError:  # a function of a C library, which has no signature
        pass
    return expect  # type: ignore[no-any-return]


def quiet_hours(text: str) -> tuple[time, time] | None:
    """The begin and the end of "22:00-07:00"; None if the text is anything else."""
    begin, _, end = text.partition("-")
    if not _TIME.fullmatch(begin) or not _TIME.fullmatch(end) or begin == end:
        return None
    return time.fromisoformat(begin), time.fromisoformat(end)


def _owner_of(task: type[Any]) -> str | None:
    owner = task.owner
    valid = owner is None or (
        isinstance(owner, str) and 0 < len(owner) <= LONGEST_OWNER and owner.isprintable()
    )
    check(valid, "owner", owner, f"one line of at most {LONGEST_OWNER} characters, or None")
    return owner  # type: ignore[no-any-return]


def _deadline_of(task: type[Any]) -> str | float | None:
    deadline = task.deadline
    if isinstance(deadline, str):
        check(
            _TIME.fullmatch(deadline) is not None,
            "deadline",
            deadline,
            "a time of day such as '06:00'",
        )
        return deadline
    valid = deadline is None or isinstance(deadline, timedelta)
    check(
        valid,
        "deadline",
        deadline,
        "a time of day such as '06:00', a timedelta after the slot, or None",
    )
    return _checked_seconds("deadline", deadline)


def _url(name: str, url: object) -> str | None:
    valid = url is None or (
        isinstance(url, str) and len(url) <= LONGEST_URL and url.isprintable() and _is_web(url)
    )
    check(
        valid, name, url, f"an http or https address of at most {LONGEST_URL:,} characters, or None"
    )
    return url  # type: ignore[return-value]


def _is_web(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and " " not in url
    except ValueError:
        return False


def _checked_seconds(name: str, value: object) -> float | None:
    if value is None:
        return None
    seconds = _seconds(value)
    valid = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    valid = valid and 0 < seconds <= LONGEST.total_seconds()
    check(valid, name, value, "seconds above 0 (up to 100 years), a timedelta, or None")
    return float(seconds)


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
    limit, rate = task.limit, task.rate
    check(limit is None or isinstance(limit, Limit), "limit", limit, "a Limit(…), or None")
    check(rate is None or isinstance(rate, Rate), "rate", rate, "a Rate(…), or None")
    if limit is not None or rate is not None:
        which = "limit" if limit is not None else "rate"
        check(running is None, "max_running", running, f"None for a task with a {which}")
        valid = task.overlap in ("skip", "allow")
        check(valid, "overlap", task.overlap, f"'allow', which a {which} implies")
    if limit is not None and rate is not None:
        rate.check_with(limit)


def tags_of(task: type[Any]) -> tuple[str, ...]:
    """The tags of a task class, each once. Raises InvalidTask."""
    tags: Any = task.tags
    valid = isinstance(tags, tuple | list) and len(tags) <= MOST_TAGS
    valid = valid and all(isinstance(tag, str) and NAME.fullmatch(tag) for tag in tags)
    check(valid, "tags", tags, f"a tuple of at most {MOST_TAGS} names of a-z 0-9 _ . -")
    return tuple(dict.fromkeys(tags))


def not_run_again(reason: str) -> str:
    """The reason why a run of a task with `rerun = False` fails, when other runs would be
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
