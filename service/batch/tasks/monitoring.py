"""What a task declares about its monitoring: its owner, what is expected of its runs, and who gets
which message.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import time, timedelta
from typing import Any
from urllib.parse import urlsplit

from service.batch.tasks.policies import LONGEST, NAME, check, fields_of
from service.errors import InvalidTask

ATTRIBUTES = (
    "owner",
    "runbook",
    "alerts",
    "deadline",
    "expect",
    "expect_every",
    "each_slot_counts",
    "ping",
)

MOST_CHANNELS = 10
LONGEST_OWNER = 200
LONGEST_URL = 2_000

_TIME = re.compile(r"([01]\d|2[0-3]):([0-5]\d)")

Expect = Callable[[Any], Any]


@dataclass(frozen=True)
class Alerts:
    """When incidents of a task are sent, and to whom. What is None follows the settings of the
    service.

    Attributes:
        after_failures: Send the incident of an error only when this many runs have failed with it.
        close_after: An incident of an error is over only when this many runs in a row have
            succeeded after it.
        late_after: A slot whose run has not started after this many seconds is late.
        slow_after: A run that goes on for more than this many seconds is slow.
        stalled_after: A run whose progress has not changed for this many seconds is slow.
        to: The names of the channels to use, instead of the channels for all tasks.
        quiet: A time of day in the zone of the task, such as "22:00-07:00", in which nothing is
            sent. What opens then and is still open at its end is sent at its end.
    """

    after_failures: int
    close_after: int
    late_after: float | None
    slow_after: float | None
    stalled_after: float | None
    to: tuple[str, ...]
    quiet: str | None

    def __init__(
        self,
        after_failures: int = 1,
        close_after: int = 1,
        late_after: float | timedelta | None = None,
        slow_after: float | timedelta | None = None,
        stalled_after: float | timedelta | None = None,
        to: str | tuple[str, ...] | list[str] = (),
        quiet: str | None = None,
    ) -> None:
        """Times are seconds or a timedelta. Raises InvalidTask, which names the argument and what
        is allowed.
        """
        names = (to,) if isinstance(to, str) else tuple(to) if isinstance(to, tuple | list) else to
        vars(self).update(
            after_failures=after_failures,
            close_after=close_after,
            late_after=_seconds("Alerts(late_after)", late_after),
            slow_after=_seconds("Alerts(slow_after)", slow_after),
            stalled_after=_seconds("Alerts(stalled_after)", stalled_after),
            to=names,
            quiet=quiet,
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


@dataclass(frozen=True)
class Monitoring:
    """What a task declares about its monitoring, as it was checked. Times are in seconds.

    Attributes:
        deadline: The time of day ("06:00") or the seconds after a slot until which the slot must
            have succeeded.
        expects: Whether the task has an `expect`, which checks the results of its runs.
        each_slot_counts: Whether only a success of the same slot makes a failed slot good.
        ping: The address that is told when a run begins and ends. It is a secret, so the ledger
            does not have it.
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
        """Read and check the class attributes. Raises InvalidTask naming the attribute and what is
        allowed.

        `takes_slot`: whether `run` has a parameter `slot`. Then each slot is work of its own,
        unless the task says otherwise.
        """
        check(isinstance(task.alerts, Alerts), "alerts", task.alerts, "an Alerts(…)")
        counts = task.each_slot_counts
        check(
            counts is None or isinstance(counts, bool),
            "each_slot_counts",
            counts,
            "True, False or None",
        )
        return cls(
            owner=_owner_of(task),
            runbook=_url("runbook", task.runbook),
            alerts=task.alerts,
            deadline=_deadline_of(task),
            expect_every=_seconds("expect_every", task.expect_every),
            expects=expect_of(task) is not None,
            each_slot_counts=takes_slot if counts is None else counts,
            ping=_url("ping", task.ping),
        )

    def as_json(self) -> dict[str, Any]:
        """As the ledger stores it, for processes that have not loaded the task."""
        values = {**fields_of(self), "alerts": fields_of(self.alerts)}
        return {name: value for name, value in values.items() if name != "ping"}


def expect_of(task: type[Any]) -> Expect | None:
    """The function `expect` of a task class, which gets the result of a run. Raises InvalidTask.

    It is read from the class, so that a lambda there is called with the result and not with an
    instance.
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
    return _seconds("deadline", deadline)


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


def _seconds(name: str, value: object) -> float | None:
    if value is None:
        return None
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    valid = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    valid = valid and 0 < seconds <= LONGEST.total_seconds()  # type: ignore[operator]
    check(valid, name, value, "seconds above 0 (up to 100 years), a timedelta, or None")
    return float(seconds)  # type: ignore[arg-type]
