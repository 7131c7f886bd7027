"""Likely mistakes in what a task declares about its monitoring. Pure: no database, no clock."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import islice, pairwise

from service.batch.cron.cron import Schedule
from service.batch.tasks.registry import Task

SAMPLE = 100
"""How many of the next slots are examined."""


def mistakes(task: Task, now: datetime) -> Iterator[tuple[str, str]]:
    """The rule and the message of each warning. `now`: aware."""
    monitoring, alerts = task.monitoring, task.monitoring.alerts
    if task.schedule is None:
        if monitoring.deadline is not None:
            yield (
                "deadline-without-schedule",
                "deadline is of no use: the task has no schedule, so it has no slots",
            )
        if alerts.late_after is not None:
            yield (
                "late-without-schedule",
                "Alerts(late_after) is of no use: the task has no schedule, so no slot is late",
            )
    elif monitoring.expect_every is not None:
        longest = _longest_interval(task.schedule, now)
        if longest is not None and timedelta(seconds=monitoring.expect_every) < longest:
            yield (
                "expect-every-too-short",
                f"expect_every = {monitoring.expect_every:g} s, but up to "
                f"{longest.total_seconds():g} s pass between two slots: the task would be "
                "reported as silent although it runs",
            )
    timeout = task.policies.timeout
    if timeout is not None and alerts.slow_after is not None and alerts.slow_after >= timeout:
        yield (
            "slow-beyond-timeout",
            f"Alerts(slow_after) is of no use: a run is ended after {timeout:g} s (timeout)",
        )
    if alerts.close_after > 1 and monitoring.each_slot_counts:
        yield (
            "close-after-each-slot",
            "Alerts(close_after) counts successes of any slot, but a failed slot is made good by "
            "its own only",
        )


def _longest_interval(of: Schedule, now: datetime) -> timedelta | None:
    slots = list(islice(of.following(now, SAMPLE), SAMPLE))
    return max((after - before for before, after in pairwise(slots)), default=None)
