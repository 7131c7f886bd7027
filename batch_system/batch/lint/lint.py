"""Lint: likely mistakes in a task that loads and runs. Pure: no database, no clock.

A warning is something that the author should change. A note is something to know that may be
intended.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise

from batch_system.batch.cron.cron import Schedule, schedule
from batch_system.batch.lint.blocking import blocking_calls
from batch_system.batch.lint.clock_changes import effects
from batch_system.batch.tasks.base import BaseTask
from batch_system.batch.tasks.declaration import MONITORING, ON_TIME, Retry
from batch_system.batch.tasks.registry import Task
from batch_system.settings.pools import DEFAULT_POOL

YEAR = timedelta(days=366)
SAMPLE, LONGEST_SAMPLE = 500, 100
"""The number of next slots from which the shortest and the longest interval are computed."""

MANY = 1_000
"""More runs than this that catch up together are a likely mistake."""

OPTIONAL = (
    "description",
    "timezone",
    "timeout",
    "retry",
    "overlap",
    "missed",
    "priority",
    "after",
    "limit",
    "rate",
    "max_running",
    "max_waiting",
    *MONITORING,
)
ELSEWHERE = {
    **dict.fromkeys(("tz", "time_zone", "zone"), "timezone"),
    **dict.fromkeys(("time_limit", "max_time", "timeout_seconds"), "timeout"),
    **dict.fromkeys(("retries", "max_retries", "attempts"), "retry"),
    **dict.fromkeys(("catchup", "catch_up", "misfire", "misfire_grace_time"), "missed"),
    **dict.fromkeys(("coalesce", "concurrency_policy"), "overlap"),
    **dict.fromkeys(
        ("concurrency", "concurrency_limit", "max_concurrency", "max_instances"), "max_running"
    ),
    **dict.fromkeys(("depends_on", "dependencies", "requires", "upstream", "wait_for"), "after"),
    **dict.fromkeys(("rate_limit", "throttle"), "rate"),
    **dict.fromkeys(("cron", "crontab", "trigger"), "schedule"),
}
"""Names of attributes in other schedulers, with our names."""
OURS = f"{BaseTask.__module__.rpartition('.')[0]}."
"""The modules of the base classes for authors, each with attributes of its own."""


@dataclass(frozen=True)
class LintFinding:
    """A mistake: `severity` is "error", "warning" or "note", `rule` is a stable name, `message` is
    for people.
    """

    severity: str
    rule: str
    message: str


def _warning(rule: str, message: str) -> LintFinding:
    return LintFinding("warning", rule, message)


def _note(rule: str, message: str) -> LintFinding:
    return LintFinding("note", rule, message)


def findings(task: Task, now: datetime, served: Collection[str] | None = None) -> list[LintFinding]:
    """The likely mistakes in a task, warnings first. Clock changes count in the year after `now`
    (aware).

    `served`: the names of the served pools, besides the default one; None if they are not known.
    """
    unsorted = [
        *_attributes(task),
        *_body(task),
        *_limit(task),
        *_monitoring(task, now),
        *_pool(task, served),
    ]
    if task.schedule is not None:
        interval = shortest_interval(task.schedule, now)
        unsorted += [
            *_expression(task.schedule),
            *_clock(task.schedule, now),
            *_left_out(task.schedule, now),
            *_policies(task, interval),
        ]
    return sorted(unsorted, key=lambda finding: finding.severity == "note")


def unknown_upstreams(task: Task, known: Collection[str]) -> list[LintFinding]:
    """The tasks that `after` names and that are not among `known`: runs that wait for them are
    always skipped.
    """
    upstreams = task.after.tasks if task.after is not None else ()
    return [
        LintFinding("error", "after-unknown", f"there is no task {name}")
        for name in upstreams
        if name not in known
    ]


def shortest_interval(of: Schedule, now: datetime) -> timedelta:
    """The shortest time between two of the next slots after `now` (aware), ignoring clock
    changes.
    """
    slots = islice(
        schedule(of.cron).between(now.astimezone(UTC), now.astimezone(UTC) + 10 * YEAR), SAMPLE
    )
    return min((after - before for before, after in pairwise(slots)), default=10 * YEAR)


def _longest_interval(of: Schedule, now: datetime) -> timedelta | None:
    slots = list(islice(of.following(now, LONGEST_SAMPLE), LONGEST_SAMPLE))
    return max((after - before for before, after in pairwise(slots)), default=None)


def _monitoring(task: Task, now: datetime) -> Iterator[LintFinding]:
    monitoring, alerts = task.monitoring, task.monitoring.alerts
    if task.schedule is None:
        if monitoring.deadline is not None:
            yield _warning(
                "deadline-without-schedule",
                "deadline is of no use: the task has no schedule, so it has no slots",
            )
        if alerts.late_after is not None:
            yield _warning(
                "late-without-schedule",
                "Alerts(late_after) is of no use: the task has no schedule, so no slot is late",
            )
    elif monitoring.expect_every is not None:
        longest = _longest_interval(task.schedule, now)
        if longest is not None and timedelta(seconds=monitoring.expect_every) < longest:
            yield _warning(
                "expect-every-too-short",
                f"expect_every = {monitoring.expect_every:g} s, but up to "
                f"{longest.total_seconds():g} s pass between two slots: the task would be "
                "reported as silent although it runs",
            )
    timeout = task.policies.timeout
    if timeout is not None and alerts.slow_after is not None and alerts.slow_after >= timeout:
        yield _warning(
            "slow-beyond-timeout",
            f"Alerts(slow_after) is of no use: a run is ended after {timeout:g} s (timeout)",
        )
    if alerts.close_after > 1 and monitoring.each_slot_counts:
        yield _warning(
            "close-after-each-slot",
            "Alerts(close_after) counts successes of any slot, but a failed slot is made good "
            "only by its own success",
        )


def _pool(task: Task, served: Collection[str] | None) -> Iterator[LintFinding]:
    if served is not None and task.pool != DEFAULT_POOL and task.pool not in served:
        yield _warning(
            "unserved-pool",
            f"no process serves pool {task.pool}, so its runs wait: set "
            f"BATCH_POOL_{task.pool.upper()} to process or nodes, or start `batch work --pool "
            f"{task.pool}`",
        )
    if task.policies.memory is not None and task.pool == DEFAULT_POOL:
        yield _note(
            "memory-without-process",
            "memory has no effect in pool default, whose runs share one process; a pool with "
            "BATCH_POOL_…=process enforces the bound",
        )


def _policies(task: Task, interval: timedelta) -> Iterator[LintFinding]:
    policies, (slots, harm) = task.policies, _harm(task)
    after = (
        f"{'next slot' if slots == 1 else f'slot that is {slots} later'} can come after "
        f"{span(slots * interval)}"
    )
    if policies.timeout is not None and policies.timeout > slots * interval.total_seconds() > 0:
        yield _warning(
            "timeout-beyond-interval",
            f"timeout = {span(policies.timeout)}, but the {after}: with "
            f"{harm.format('during a long run')}",
        )
    waits = longest_wait(policies.retry)
    if waits > slots * interval.total_seconds() > 0:
        yield _warning(
            "retry-beyond-interval",
            f"the waits of Retry(attempts={policies.retry.attempts}) add up to {span(waits)}, "
            f"but the {after}: "
            f"with {harm.format('meanwhile')}",
        )
    yield from _missed(task, interval)


def _harm(task: Task) -> tuple[int, str]:
    """The number of slots after which a run that is still active does harm, and the harm; 0 means
    never.
    """
    policies = task.policies
    skipped = "the slots that come due {} are skipped"
    if policies.overlap == "skip":
        return task.lanes, f'overlap = "skip" {skipped}'
    if policies.overlap == "wait":
        return (
            task.lanes + policies.max_waiting,
            f'overlap = "wait" and max_waiting = {policies.max_waiting} {skipped}',
        )
    if policies.overlap == "replace":
        return task.lanes, 'overlap = "replace" a slot that comes due {} cancels the run'
    return 0, ""


def _missed(task: Task, interval: timedelta) -> Iterator[LintFinding]:
    missed = task.policies.missed
    if missed.policy == "skip":
        return
    if missed.max_age <= ON_TIME:
        yield _warning(
            "missed-never",
            f'Missed("{missed.policy}", max_age={span(missed.max_age)}) never catches up a slot: '
            f"it counts as missed when it is {span(ON_TIME)} late, and is older than max_age by "
            "then",
        )
    elif missed.max_age < interval:
        yield _note(
            "missed-max-age",
            f"after a downtime of more than {span(missed.max_age)} (max_age of missed) a slot is "
            f"not caught up, and the next one comes {span(interval)} later or more",
        )
    if missed.policy == "all" and missed.max_count is None and missed.max_age / interval > MANY:
        yield _warning(
            "missed-all-unbounded",
            f'Missed("all") without max_count: a downtime of {span(missed.max_age)} would be '
            "followed by "
            f"{missed.max_age // interval:,} runs",
        )


def _expression(of: Schedule) -> Iterator[LintFinding]:
    yield from _every_minute(of)
    day, month, weekday = of.fields[3:]
    if not day.startswith("*") and not weekday.startswith("*"):
        yield _note(
            "day-or-weekday",
            f"day-of-month {day} and day-of-week {weekday} are both given: it fires when either "
            "matches, as in cron (a day-of-week such as 1#2, with * for the day-of-month, is the "
            "second Monday)",
        )
    elif month == "*" and re.fullmatch(r"(29|30|31)([,-](29|30|31))*", day):
        yield _note(
            "short-months",
            f"not every month has day-of-month {day}; L is the last day of each month",
        )


def _every_minute(of: Schedule) -> Iterator[LintFinding]:
    """Warn of `* 2 * * *`, which fires each minute of an hour, where `0 2 * * *` is probably
    intended.
    """
    second, minute, hour = of.fields[:3]
    in_hour = minute == "*" and hour.isdigit() and (second == "*" or second.isdigit())
    if not in_hour and not (second == "*" and minute.isdigit()):
        return
    parts = of.expression.split()
    finer = len(parts) - 4  # the minute, and the second where it is given
    once = " ".join(
        "0" if place < finer and part == "*" else part for place, part in enumerate(parts)
    )
    times = 60 ** parts[:finer].count("*")
    yield _warning(
        "every-minute",
        f"it fires {times:,} times in one {'hour' if in_hour else 'minute'}; {once!r} fires once",
    )


def _clock(of: Schedule, now: datetime) -> Iterator[LintFinding]:
    effect = next(effects(of, now, now + YEAR), None)
    if effect is not None:
        yield _note("clock-change", effect.words)


def _left_out(of: Schedule, now: datetime) -> Iterator[LintFinding]:
    dates = of.excluded.dates if of.excluded is not None else None
    if dates is None:
        return
    if not dates:
        yield _warning("except-on-empty", "except_on has no date, so it leaves out nothing")
    elif max(dates) < now.astimezone(of.zone).date():
        yield _warning(
            "except-on-past",
            f"except_on has only dates in the past, the last one is {max(dates)}, so it leaves out "
            "nothing",
        )


def _body(task: Task) -> Iterator[LintFinding]:
    if not task.on_loop:
        if task.policies.timeout is not None:
            yield _note(
                "sync-timeout",
                "run() is sync: at its timeout the thread is abandoned, because a thread can't "
                "be stopped",
            )
        return
    blocking = ", ".join(f"{name}() in line {line}" for line, name in blocking_calls(task.cls.run))
    if blocking:
        yield _warning(
            "blocking-call",
            f"{blocking} blocks the event loop: nothing else in this process runs meanwhile; "
            "use an async library or asyncio.to_thread, or write `def run`",
        )


def _limit(task: Task) -> Iterator[LintFinding]:
    number = task.policies.limit.number if task.policies.limit is not None else None
    if not inspect.iscoroutinefunction(number):
        return
    blocking = ", ".join(f"{name}() in line {line}" for line, name in blocking_calls(number))
    if blocking:
        yield _warning(
            "blocking-call",
            f"the function of its limit: {blocking} blocks the event loop; use an async library, "
            "or write `def`, which runs in a thread",
        )


def _attributes(task: Task) -> Iterator[LintFinding]:
    """Warn of class attributes that have no effect but look like a policy by another name."""
    own = [cls for cls in task.cls.__mro__ if issubclass(cls, BaseTask) and cls is not BaseTask]
    declared = {name for cls in own for name in vars(cls)}
    unset = [name for name in OPTIONAL if name not in declared] + (
        ["schedule"] if task.schedule is None else []
    )
    ours = {
        name for cls in task.cls.__mro__ if cls.__module__.startswith(OURS) for name in vars(cls)
    }
    for name in sorted(name for name in declared - ours if not name.startswith("_")):
        if name == "schedule" or callable(getattr(task.cls, name, None)):
            continue
        policy = _closest_policy(name, unset)
        if policy is not None:
            yield _warning(
                "unknown-attribute", f"the attribute {name} has no effect; is {policy} intended?"
            )


def _closest_policy(name: str, unset: Sequence[str]) -> str | None:
    policy = ELSEWHERE.get(name)
    if policy in unset:
        return policy
    return next(iter(difflib.get_close_matches(name, unset, 1, 0.8)), None)


def longest_wait(retry: Retry) -> float:
    """The sum of all waits between the attempts of a run, in seconds, without jitter."""
    total, wait = 0.0, retry.wait
    for number in range(retry.attempts - 1):
        if wait >= retry.max_wait or retry.factor == 1 or wait == 0:
            return total + min(wait, retry.max_wait) * (retry.attempts - 1 - number)
        total, wait = total + wait, wait * retry.factor
    return total


def span(time: float | timedelta) -> str:
    """A length of time in words, in its two largest units; a number is in seconds."""
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
