"""The checked arguments of `start()` and `start_all()`: plain values, which another process may
send.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from batch_system.batch.tasks.declaration import LONGEST
from batch_system.batch.tasks.registry import Task
from batch_system.errors import InvalidParameters
from batch_system.escaping import echoed

How = Literal["created", "known", "pending"]

LONGEST_KEY = 200
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
    """The facts about a task that queueing a run needs. `source`: its file. `exclusive`: the queue
    whose runs take lanes.
    """

    name: str
    source: str
    exclusive: str | None
    priority: int

    @classmethod
    def of(cls, task: Task) -> Startable:
        """The facts about a task that this process has loaded."""
        return cls(task.name, task.source, task.exclusive, task.policies.priority)


@dataclass(frozen=True)
class StartRequest:
    """A request for one run. The run does not begin before `at` (aware), or before `delay` seconds
    have passed.
    """

    task: Startable
    params: dict[str, Any] | None
    key: str | None = None
    slot: datetime | None = None
    at: datetime | None = None
    delay: float | None = None

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
        if at is not None and delay is not None:
            raise InvalidParameters(f"{call}: at and delay were both given; allowed: one of them")
        own = {"key": key, "at": at, "delay": delay, "in_group": in_group or None}
        stored = task.parameters.to_json(_parameters_of_run(task, call, own, given, params)) or None
        return cls(Startable.of(task), stored, key, slot, at, _seconds(call, delay))


class StartedRun(str):
    """The id of the run that a start has made or found. The driver asyncpg takes only a plain
    string for a UUID: `str(run)`.

    Attributes:
      how: `created`; `known` if the task has had a run with this key already; `pending` if the
          start is written beside the caller's data, and the ledger gets it after the commit.
    """

    __slots__ = ("how",)

    def __new__(cls, id: str, how: How) -> StartedRun:
        run = super().__new__(cls, id)
        run.how = how
        return run

    how: How


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


def _seconds(call: str, delay: Any) -> float | None:
    if delay is None:
        return None
    seconds = delay.total_seconds() if isinstance(delay, timedelta) else delay
    valid = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not valid or not 0 <= seconds <= LONGEST.total_seconds():
        raise InvalidParameters(
            f"{call}: delay is {echoed(delay)}; allowed: seconds from 0 (up to 100 years), or a "
            "timedelta"
        )
    return float(seconds)
