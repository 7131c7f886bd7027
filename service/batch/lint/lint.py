"""What is likely to be a mistake in a task that can be used as it is. Pure: no database, no clock.

A warning is something to change. A note is something to know, which may well be meant.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise

from service.batch.cron.cron import Schedule, schedule
from service.batch.firing.misfires import ON_TIME
from service.batch.lint.blocking import blocking_calls
from service.batch.lint.clock_changes import effects
from service.batch.tasks.base import BaseTask
from service.batch.tasks.policies import Retry
from service.batch.tasks.registry import Task

YEAR = timedelta(days=366)
SAMPLE = 500
"""Slots that are looked at for the shortest interval."""

MANY = 1_000
"""So many runs that catch up at once are taken for a mistake."""

OPTIONAL = (
    "description",
    "timezone",
    "timeout",
    "retry",
    "overlap",
    "missed",
    "priority",
    "max_running",
    "max_waiting",
)
ELSEWHERE = {
    **dict.fromkeys(("tz", "time_zone", "zone"), "timezone"),
    **dict.fromkeys(("time_limit", "max_time", "timeout_seconds"), "timeout"),
    **dict.fromkeys(("retries", "max_retries", "attempts"), "retry"),
    **dict.fromkeys(("catchup", "catch_up", "misfire", "misfire_grace_time"), "missed"),
    **dict.fromkeys(("coalesce", "concurrency_policy"), "overlap"),
    **dict.fromkeys(("concurrency", "concurrency_limit", "max_concurrency", "max_instances"), "max_running"),
    **dict.fromkeys(("cron", "crontab", "trigger"), "schedule"),
}
"""What other schedulers call it."""


@dataclass(frozen=True)
class Finding:
    """`rule` names the kind for programs, `message` says it to a person."""

    severity: str
    rule: str
    message: str


def warning(rule: str, message: str) -> Finding:
    return Finding("warning", rule, message)


def note(rule: str, message: str) -> Finding:
    return Finding("note", rule, message)


def findings(task: Task, now: datetime) -> list[Finding]:
    """Everything about a task that is worth a look: warnings first. `now` (aware) is where its next year begins."""
    found = [*_attributes(task), *_body(task)]
    if task.schedule is not None:
        interval = shortest_interval(task.schedule, now)
        found += [*_expression(task.schedule), *_clock(task.schedule, now), *_policies(task, interval)]
    return sorted(found, key=lambda finding: finding.severity == "note")


def shortest_interval(of: Schedule, now: datetime) -> timedelta:
    """Between two of its next slots, as they would be without clock changes."""
    slots = islice(schedule(of.cron).between(now.astimezone(UTC), now.astimezone(UTC) + 10 * YEAR), SAMPLE)
    return min((after - before for before, after in pairwise(slots)), default=10 * YEAR)


def _policies(task: Task, interval: timedelta) -> Iterator[Finding]:
    policies, (slots, harm) = task.policies, _harm(task)
    after = f"{'next slot' if slots == 1 else f'slot that is {slots} later'} can come after {span(slots * interval)}"
    if policies.timeout is not None and policies.timeout > slots * interval.total_seconds() > 0:
        yield warning(
            "timeout-beyond-interval",
            f"timeout = {span(policies.timeout)}, but the {after}: with {harm.format('during a long run')}",
        )
    waits = longest_wait(policies.retry)
    if waits > slots * interval.total_seconds() > 0:
        yield warning(
            "retry-beyond-interval",
            f"the waits of Retry(attempts={policies.retry.attempts}) add up to {span(waits)}, but the {after}: "
            f"with {harm.format('meanwhile')}",
        )
    yield from _missed(task, interval)


def _harm(task: Task) -> tuple[int, str]:
    """How many slots later a run that is still active does harm, and which; 0: never."""
    policies = task.policies
    skipped = "the slots that come due {} are skipped"
    if policies.overlap == "skip":
        return task.lanes, f'overlap = "skip" {skipped}'
    if policies.overlap == "wait":
        return task.lanes + policies.max_waiting, f'overlap = "wait" and max_waiting = {policies.max_waiting} {skipped}'
    if policies.overlap == "replace":
        return task.lanes, 'overlap = "replace" a slot that comes due {} cancels the run'
    return 0, ""


def _missed(task: Task, interval: timedelta) -> Iterator[Finding]:
    missed = task.policies.missed
    if missed.policy == "skip":
        return
    if missed.max_age <= ON_TIME:
        yield warning(
            "missed-never",
            f'Missed("{missed.policy}", max_age={span(missed.max_age)}) catches up nothing: a slot counts as missed '
            f"from {span(ON_TIME)} on, and is too old by then",
        )
    elif missed.max_age < interval:
        yield note(
            "missed-max-age",
            f"after a downtime of more than {span(missed.max_age)} (max_age of missed) a slot is not caught up, and "
            f"the next one comes {span(interval)} later or more",
        )
    if missed.policy == "all" and missed.max_count is None and missed.max_age / interval > MANY:
        yield warning(
            "missed-all-unbounded",
            f'Missed("all") without max_count: a downtime of {span(missed.max_age)} would be followed by '
            f"{missed.max_age // interval:,} runs",
        )


def _expression(of: Schedule) -> Iterator[Finding]:
    yield from _every_minute(of)
    day, month, weekday = of.fields[3:]
    if not day.startswith("*") and not weekday.startswith("*"):
        yield note(
            "day-or-weekday",
            f"day-of-month {day} and day-of-week {weekday} are both given: it fires when either fits, as in cron "
            "(a day-of-week such as 1#2, with * for the day-of-month, is the second Monday)",
        )
    elif month == "*" and re.fullmatch(r"(29|30|31)([,-](29|30|31))*", day):
        yield note("short-months", f"day-of-month {day} is not in every month; L is the last day of each")


def _every_minute(of: Schedule) -> Iterator[Finding]:
    """`* 2 * * *`, where `0 2 * * *` is meant."""
    second, minute, hour = of.fields[:3]
    in_hour = minute == "*" and hour.isdigit() and (second == "*" or second.isdigit())
    if not in_hour and not (second == "*" and minute.isdigit()):
        return
    parts = of.cron.split()
    finer = len(parts) - 4  # the minute, and the second where it is given
    once = " ".join("0" if place < finer and part == "*" else part for place, part in enumerate(parts))
    times = 60 ** parts[:finer].count("*")
    yield warning(
        "every-minute",
        f"it fires {times:,} times in one {'hour' if in_hour else 'minute'}; {once!r} fires once",
    )


def _clock(of: Schedule, now: datetime) -> Iterator[Finding]:
    effect = next(effects(of, now, now + YEAR), None)
    if effect is not None:
        yield note("clock-change", effect.words)


def _body(task: Task) -> Iterator[Finding]:
    if not task.on_loop:
        if task.policies.timeout is not None:
            yield note("sync-timeout", "run() is sync: at its timeout the thread is given up, but can't be stopped")
        return
    blocking = ", ".join(f"{name}() in line {line}" for line, name in blocking_calls(task.cls.run))
    if blocking:
        yield warning(
            "blocking-call",
            f"{blocking}: while it waits, nothing else runs in this process; "
            "use an async library or asyncio.to_thread, or write `def run`",
        )


def _attributes(task: Task) -> Iterator[Finding]:
    """Class attributes that look like a policy with another name: they do nothing."""
    own = [cls for cls in task.cls.__mro__ if issubclass(cls, BaseTask) and cls is not BaseTask]
    given = {name for cls in own for name in vars(cls)}
    free = [name for name in OPTIONAL if name not in given] + (["schedule"] if task.schedule is None else [])
    for name in sorted(name for name in given if not name.startswith("_")):
        if name in vars(BaseTask) or name == "schedule" or callable(getattr(task.cls, name, None)):
            continue
        meant = _meant(name, free)
        if meant is not None:
            yield warning("unknown-attribute", f"the attribute {name} does nothing; is {meant} meant?")


def _meant(name: str, free: Sequence[str]) -> str | None:
    other = ELSEWHERE.get(name)
    if other in free:
        return other
    return next(iter(difflib.get_close_matches(name, free, 1, 0.8)), None)


def longest_wait(retry: Retry) -> float:
    """Seconds that all waits of a run add up to, without their jitter."""
    total, wait = 0.0, retry.wait
    for number in range(retry.attempts - 1):
        if wait >= retry.max_wait or retry.factor == 1 or wait == 0:
            return total + min(wait, retry.max_wait) * (retry.attempts - 1 - number)
        total, wait = total + wait, wait * retry.factor
    return total


def span(time: float | timedelta) -> str:
    """A length of time (seconds where it is a number) in the two largest units that it has."""
    seconds = time.total_seconds() if isinstance(time, timedelta) else float(time)
    if seconds < 60:
        return f"{seconds:g} s"
    units = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))
    parts, rest = [], round(seconds)
    for size, unit in units:
        number, rest = divmod(rest, size)
        if number:
            parts.append(f"{number} {unit}")
    return " ".join(parts[:2])
