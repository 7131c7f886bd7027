"""Lint finds likely mistakes in a task, and no others: each rule is tested with a similar task
without the mistake.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from datetime import UTC, datetime, timedelta
from time import sleep
from typing import Any

import pytest

from batch_system import BaseTask, ItemTask, Limit, Missed, Retry, TaskRegistry
from batch_system.batch.cron.cron import schedule
from batch_system.batch.lint.lint import (
    LintFinding,
    findings,
    longest_wait,
    shortest_interval,
    span,
)
from tests.batch.ledger_world import make_task

NOW = datetime(2026, 6, 1, 12, 30, tzinfo=UTC)
DAY = timedelta(days=1)


def found(
    cron: str | None = "0 2 * * *", /, run: Any = None, **attributes: Any
) -> list[LintFinding]:
    return findings(make_task("report", cron, run, **attributes), NOW)


def rules(
    cron: str | None = "0 2 * * *", /, run: Any = None, **attributes: Any
) -> list[tuple[str, str]]:
    return [(finding.severity, finding.rule) for finding in found(cron, run, **attributes)]


def sync(self: BaseTask) -> None:
    time.sleep(1)


async def blocking(self: BaseTask) -> None:
    time.sleep(1)
    sleep(1)
    subprocess.run(["true"])


async def careful(self: BaseTask) -> None:
    await asyncio.sleep(1)
    await asyncio.to_thread(time.sleep, 1)
    await asyncio.to_thread(lambda: time.sleep(1))

    def later() -> None:
        time.sleep(1)

    await asyncio.to_thread(later)


async def mail(self: BaseTask, tenant: str = "acme") -> None: ...


WRONG: list[tuple[str, str, str | None, dict[str, Any]]] = [
    ("warning", "timeout-beyond-interval", "0 * * * *", {"timeout": 3601}),
    ("warning", "retry-beyond-interval", "*/5 * * * *", {"retry": Retry(attempts=4, wait=60)}),
    ("warning", "timeout-beyond-interval", "0 * * * *", {"timeout": 10801, "max_running": 3}),
    ("warning", "timeout-beyond-interval", "0 * * * *", {"timeout": 7201, "overlap": "wait"}),
    ("warning", "timeout-beyond-interval", "0 * * * *", {"timeout": 3601, "overlap": "replace"}),
    (
        "warning",
        "retry-beyond-interval",
        "0 * * * *",
        {"retry": Retry(2, 7201, max_wait=9999), "overlap": "wait"},
    ),
    (
        "warning",
        "missed-never",
        "0 * * * *",
        {"missed": Missed("once", max_age=timedelta(minutes=1))},
    ),
    ("note", "missed-max-age", "0 0 * * 0", {}),
    ("warning", "missed-all-unbounded", "* * * * *", {"missed": "all"}),
    ("warning", "every-minute", "* 2 * * *", {}),
    ("warning", "every-minute", "* 30 2 * * *", {}),
    ("note", "day-or-weekday", "0 0 1-7 * 1", {}),
    ("note", "short-months", "0 0 31 * *", {"missed": "skip"}),
    ("note", "short-months", "0 0 29-31 * *", {"missed": "skip"}),
    ("note", "clock-change", "30 2 * * *", {"timezone": "Europe/Berlin"}),
    ("note", "sync-timeout", "0 2 * * *", {"run": sync, "timeout": 60}),
    ("warning", "blocking-call", "0 2 * * *", {"run": blocking}),
    ("warning", "unknown-attribute", "0 2 * * *", {"retries": 3}),
    ("warning", "unknown-attribute", "0 2 * * *", {"time_zone": "Asia/Tokyo"}),
    ("warning", "unknown-attribute", "0 2 * * *", {"max_instances": 3}),
    ("warning", "unknown-attribute", "0 2 * * *", {"time_out": 60}),
    ("warning", "unknown-attribute", None, {"cron": "0 2 * * *"}),
]

FINE: list[tuple[str | None, dict[str, Any]]] = [
    ("0 * * * *", {"timeout": 3600}),
    ("0 * * * *", {"timeout": 7200, "overlap": "allow"}),
    ("0 * * * *", {"timeout": 7201, "overlap": "allow", "max_running": 2}),
    ("0 * * * *", {"timeout": 10800, "max_running": 3}),
    ("0 * * * *", {"timeout": 7200, "overlap": "wait"}),
    ("0 * * * *", {"timeout": 10800, "overlap": "wait", "max_waiting": 2}),
    ("0 * * * *", {"timeout": 3600, "overlap": "replace"}),
    ("0 * * * *", {"retry": Retry(attempts=5, wait=60)}),
    ("*/5 * * * *", {"retry": Retry(attempts=4, wait=60), "overlap": "allow"}),
    ("0 0 * * 0", {"missed": "skip"}),
    ("0 0 * * 0", {"missed": Missed("once", max_age=7 * DAY)}),
    ("* * * * *", {"missed": Missed("all", max_count=100)}),
    ("* * * * *", {"missed": Missed("all", max_age=timedelta(hours=1))}),
    ("* 9-17 * * 1-5", {}),
    ("*/5 2 * * *", {}),
    ("0 0 L * *", {"missed": "skip"}),
    ("0 0 28 * *", {"missed": "skip"}),
    ("0 0 31 1 *", {"missed": "skip"}),
    ("0 0 * * 1-5", {"missed": "skip"}),
    ("30 3 * * *", {"timezone": "Europe/Berlin"}),
    ("0 2 * * *", {"run": sync}),
    (None, {"run": mail, "limit": Limit(sync, key="tenant", default=1)}),
    ("0 2 * * *", {"run": careful, "timeout": 60}),
    (
        "0 2 * * *",
        {
            "names": ["a"],
            "table": "users",
            "retry_after": 3,
            "description": "Says it",
            "_retries": 1,
        },
    ),
    ("0 2 * * *", {"cron": "something of the author's"}),
    (None, {"timeout": 60, "retry": Retry(attempts=9, wait=3600)}),
]


@pytest.mark.parametrize(("severity", "rule", "cron", "attributes"), WRONG)
def test_a_likely_mistake_is_found(
    severity: str, rule: str, cron: str | None, attributes: dict[str, Any]
) -> None:
    assert rules(cron, **attributes) == [(severity, rule)]


@pytest.mark.parametrize(("cron", "attributes"), FINE)
def test_a_declaration_without_a_likely_mistake_has_no_finding(
    cron: str | None, attributes: dict[str, Any]
) -> None:
    assert found(cron, **attributes) == []


def test_warnings_come_before_notes() -> None:
    severities = [
        severity for severity, _ in rules("* 2 * * *", timezone="Europe/Berlin", missed="all")
    ]
    assert severities == ["warning", "warning", "note"]


@pytest.mark.parametrize(
    ("cron", "attributes", "words"),
    [
        (
            "0 * * * *",
            {"timeout": 5400},
            ["timeout = 1 h 30 min", "after 1 h:", 'overlap = "skip"'],
        ),
        (
            "0 * * * *",
            {"timeout": 7201, "overlap": "wait"},
            [
                "the slot that is 2 later can come after 2 h",
                '"wait" and max_waiting = 1 the slots',
                "are skipped",
            ],
        ),
        (
            "0 * * * *",
            {"timeout": 3601, "overlap": "replace"},
            ['"replace" a slot', "during a long run cancels the run"],
        ),
        ("* * * * *", {"missed": "all"}, ["max_count", "1 d", "1,440 runs"]),
        ("* 2 * * *", {}, ["60 times in one hour", "'0 2 * * *'"]),
        ("* * 2 * * *", {}, ["3,600 times in one hour", "'0 0 2 * * *'"]),
        ("* 30 2 * * *", {}, ["60 times in one minute", "'0 30 2 * * *'"]),
        (
            "0 2 * * *",
            {"run": blocking},
            ["time.sleep() in line", ", sleep() in line", "subprocess.run() in line"],
        ),
        (
            None,
            {"run": mail, "limit": Limit(blocking, key="tenant", default=1)},
            ["the function of its limit: time.sleep() in line", "or write `def`"],
        ),
        ("0 2 * * *", {"retries": 3}, ["retries", "is retry intended?"]),
        (None, {"throttle": "10/m"}, ["throttle", "is rate intended?"]),
        ("0 0 31 * *", {"missed": "skip"}, ["31", "L is the last day"]),
    ],
)
def test_a_message_names_what_is_wrong(
    cron: str | None, attributes: dict[str, Any], words: list[str]
) -> None:
    [finding] = found(cron, **attributes)
    assert [word for word in words if word not in finding.message] == []


def test_an_attribute_of_an_authors_base_class_counts_as_given() -> None:
    class _Base(BaseTask):
        timeout = 60
        max_time = 3

    class Report(_Base):
        name, schedule = "report", "0 2 * * *"

        async def run(self) -> None: ...

    TaskRegistry.register(Report)
    assert findings(TaskRegistry.get("report"), NOW) == []


def test_the_attributes_of_an_item_task_have_an_effect() -> None:
    class Prices(ItemTask):
        name, schedule, concurrency, size, key = "prices", "0 2 * * *", 4, 50, ("id",)

        def items(self) -> Any: ...

        async def save(self, db: Any, item: Any, fetched: Any) -> None: ...

    TaskRegistry.register(Prices)
    assert findings(TaskRegistry.get("prices"), NOW) == []


@pytest.mark.parametrize(
    ("retry", "seconds"),
    [
        (Retry(), 0),
        (Retry(attempts=2, wait=10), 10),
        (Retry(attempts=4, wait=10, factor=2), 70),
        (Retry(attempts=4, wait=10, factor=10, max_wait=50), 110),
        (Retry(attempts=10**9, wait=10, factor=1), 10 * (10**9 - 1)),
        (Retry(attempts=10**9, wait=0), 0),
    ],
)
def test_the_waits_of_a_retry_add_up(retry: Retry, seconds: float) -> None:
    assert longest_wait(retry) == seconds


@pytest.mark.parametrize(
    ("cron", "interval"),
    [
        ("*/7 * * * *", timedelta(minutes=4)),
        ("0 9,17 * * *", timedelta(hours=8)),
        ("0 2 * * *", DAY),
        ("0 0 29 2 *", 1461 * DAY),
    ],
)
def test_the_shortest_interval_of_a_schedule(cron: str, interval: timedelta) -> None:
    assert shortest_interval(schedule(cron, "Europe/Berlin"), NOW) == interval


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.5, "0.5 s"),
        (60, "1 min"),
        (90, "1 min 30 s"),
        (5400, "1 h 30 min"),
        (90_061, "1 d 1 h"),
        (86_400, "1 d"),
    ],
)
def test_a_span_in_words(seconds: float, words: str) -> None:
    assert span(seconds) == words
