"""The checked arguments of `start()` and `start_all()`: plain values, which another process may
send.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from batch_system.batch.ledger.states import RANK_OF_PRIORITY, How, StartPriority
from batch_system.batch.tasks.declaration import LONGEST
from batch_system.batch.tasks.limit import Queueing
from batch_system.batch.tasks.registry import Task
from batch_system.errors import InvalidParameters
from batch_system.escaping import echoed

LONGEST_KEY = 200
MERGING = ("debounce", "at_most", "once_in")
TIMES_DEBOUNCE = 10
"""Without `at_most`, a run is postponed for at most this many times `debounce`."""
YEARS = range(1901, 9000)
"""The allowed years of instants. In other years, an engine may be unable to convert a slot to the
task's time zone.
"""
INSTANT = f"an aware datetime of the years {YEARS[0]} to {YEARS[-1]}"


def is_instant(value: object) -> bool:
    """Whether this is an instant as INSTANT describes it."""
    return isinstance(value, datetime) and value.utcoffset() is not None and value.year in YEARS


@dataclass(frozen=True)
class Startable:
    """The facts about a task that queueing a run needs. `source`: its file. `queueing`: in which
    queue its runs are.
    """

    name: str
    source: str
    queueing: Queueing
    priority: int

    @classmethod
    def of(cls, task: Task) -> Startable:
        """The facts about a task that this process has loaded."""
        return cls(task.name, task.source, task.queueing, task.policies.priority)


@dataclass(frozen=True)
class Merging:
    """How starts with one `key` of a task become one run. The times are in seconds.

    With `debounce` they are one waiting run, which each of them postpones, together by `at_most`.
    With `once_in` one of them makes a run, and those that follow within this time make none.
    """

    key: str
    debounce: float | None = None
    at_most: float | None = None
    once_in: float | None = None


@dataclass(frozen=True)
class StartRequest:
    """A request for one run. The run does not begin before `at` (aware), or before `delay` seconds
    have passed. `priority`: whether it goes before, or after, the others of its queue.
    """

    task: Startable
    params: dict[str, Any] | None
    key: str | None = None
    slot: datetime | None = None
    at: datetime | None = None
    delay: float | None = None
    merging: Merging | None = None
    priority: StartPriority | None = None

    @classmethod
    def checked(
        cls,
        task: Task,
        given: Mapping[str, Any],
        *,
        key: Any = None,
        slot: Any = None,
        at: Any = None,
        delay: Any = None,
        in_group: bool = False,
        params: Any = None,
        debounce: Any = None,
        at_most: Any = None,
        once_in: Any = None,
        priority: Any = None,
    ) -> StartRequest:
        """Check the arguments of a caller. `given`: the parameters of `run()`. Raises
        InvalidParameters.
        """
        call = f"start({task.name})"
        if key is not None and not (isinstance(key, str) and 0 < len(key) <= LONGEST_KEY):
            raise InvalidParameters(
                f"{call}: key is {echoed(key)}; allowed: 1 to {LONGEST_KEY} characters"
            )
        for name, instant in (("slot", slot), ("at", at)):
            if instant is not None and not is_instant(instant):
                raise InvalidParameters(f"{call}: {name} is {echoed(instant)}; allowed: {INSTANT}")
        if priority is not None and priority not in RANK_OF_PRIORITY:
            raise InvalidParameters(
                f"{call}: priority is {echoed(priority)}; allowed: 'high', 'low' or None"
            )
        if at is not None and delay is not None:
            raise InvalidParameters(f"{call}: at and delay were both given; allowed: one of them")
        own = {"key": key, "at": at, "delay": delay, "in_group": in_group or None}
        own["priority"] = priority
        times = {"debounce": debounce, "at_most": at_most, "once_in": once_in}
        stored = task.parameters.to_json(_parameters_of_run(task, call, own | times, given, params))
        merging = merging_of(call, key, times, at=at, delay=delay)
        if merging is not None and in_group:
            raise InvalidParameters(
                f"{call}: in_group=True and {_name_of(merging)} were both given; allowed: one of "
                "them, because a merged start may belong to no group"
            )
        return cls(
            Startable.of(task),
            stored or None,
            key if merging is None else None,
            slot,
            at,
            _seconds(call, "delay", delay),
            merging,
            priority,
        )


def merging_of(
    call: str, key: str | None, times: Mapping[str, Any], at: Any = None, delay: Any = None
) -> Merging | None:
    """How a start is merged, from its checked key and its unchecked times; None if it is not.

    Raises InvalidParameters, which begins with `call`.
    """
    given = {name: _seconds(call, name, times.get(name)) for name in MERGING}
    debounce, at_most, once_in = given.values()
    if debounce is not None and once_in is not None:
        raise InvalidParameters(
            f"{call}: debounce and once_in were both given; allowed: one of them"
        )
    for name in ("debounce", "once_in"):
        if given[name] == 0:
            raise InvalidParameters(f"{call}: {name} is 0; allowed: more than 0 seconds")
    if at_most is not None and debounce is None:
        raise InvalidParameters(f"{call}: at_most needs debounce")
    if debounce is not None and at_most is not None and at_most < debounce:
        raise InvalidParameters(
            f"{call}: at_most is {at_most:g} s; allowed: at least debounce, {debounce:g} s"
        )
    if debounce is not None and (at, delay) != (None, None):
        raise InvalidParameters(
            f"{call}: debounce and {'at' if at is not None else 'delay'} were both given; "
            "allowed: one of them, because debounce says when the run begins"
        )
    if debounce is None and once_in is None:
        return None
    if debounce is not None and at_most is None:
        at_most = min(debounce * TIMES_DEBOUNCE, LONGEST.total_seconds())
    return Merging(key or "", debounce, at_most, once_in)


def _name_of(merging: Merging) -> str:
    return "debounce" if merging.debounce is not None else "once_in"


class StartedRun(str):
    """The id of the run that a start has made or found. The driver asyncpg takes only a plain
    string for a UUID: `str(run)`.

    Attributes:
      how: `created`; `merged` with a run that waits already; `dropped` if another run counts in
          the window; `known` if the task has a run with this key already; `pending` if the start is
          written beside the caller's data, and handed over to the ledger after the commit.
      until: When a debounced run begins, or the window ends (aware, UTC); None for other starts,
          and while it is pending.
    """

    __slots__ = ("how", "until")

    how: How
    until: datetime | None

    def __new__(cls, id: str, how: How, until: datetime | None = None) -> StartedRun:
        run = super().__new__(cls, id)
        run.how, run.until = how, until
        return run


@dataclass(frozen=True)
class Starts:
    """The runs that one transaction should write.

    Attributes:
      then: The follow-up: a run that waits for all of them. `gate`: which end of these runs opens
          it, see waits.Gate.
      in_group: Whether they join the group of the run that asks for them.
    """

    runs: tuple[StartRequest, ...]
    then: StartRequest | None = None
    gate: str | None = None
    in_group: bool = False

    @property
    def tasks(self) -> list[Startable]:
        """The tasks of all these runs."""
        return [each.task for each in (*self.runs, *([self.then] if self.then else []))]


def _parameters_of_run(
    task: Task, call: str, own: Mapping[str, Any], given: Mapping[str, Any], params: Any
) -> dict[str, Any]:
    if params is not None:
        if not isinstance(params, Mapping) or given:
            raise InvalidParameters(
                f"{call}: params has to be a dict with all parameters of run(), and no other "
                "parameter is given then"
            )
        return dict(params)
    both = sorted(
        name for name, value in own.items() if value is not None and name in task.parameters.names
    )
    if both:
        raise InvalidParameters(
            f"{call}: run() has a parameter `{both[0]}`, and start() has one of that name too: "
            f"give the parameters of run() as params={{'{both[0]}': …}}"
        )
    return dict(given)


def _seconds(call: str, name: str, given: Any) -> float | None:
    if given is None:
        return None
    seconds = given.total_seconds() if isinstance(given, timedelta) else given
    valid = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not valid or not 0 <= seconds <= LONGEST.total_seconds():
        raise InvalidParameters(
            f"{call}: {name} is {echoed(given)}; allowed: seconds from 0 (up to 100 years), or a "
            "timedelta"
        )
    return float(seconds)
