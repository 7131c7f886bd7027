"""`/metrics`: who may read it, what it has, how often the ledger is read for it, and how many
labels there are.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import event, insert

from batch_system import clock
from batch_system.batch.ledger.schedules import OpenSchedule
from batch_system.batch.ledger.tables import backups, new_id, runs, tasks
from batch_system.database.companions import quarantine
from batch_system.metrics.process import OTHER, ProcessMetrics, ProcessSnapshot, TaskLabels
from batch_system.operations.system import gauges
from batch_system.operations.system.gauges import Gauges, TaskGauges
from batch_system.verbs.run_changes import StartRun
from batch_system.verbs.runs import ShowRun
from batch_system.verbs.tasks import PauseTask
from batch_system.web import exposition
from tests.batch.ledger_world import until
from tests.batch.test_runs import new
from tests.web.conftest import Served, client_of, served

__all__ = ["served"]

MORE = """
from batch_system import BaseTask, Limit, Part, PartitionedTask

class Tick(BaseTask):
    name, schedule = "tick", "* * * * * *"
    async def run(self): pass

class Load(BaseTask):
    name, schedule = "load", None
    async def run(self):
        async for chunk in self.chunks(range(5), size=2):
            async with chunk:
                pass

class Mail(BaseTask):
    name, schedule = "mail", None
    limit = Limit(lambda tenant: 0, key="tenant", default=0)
    async def run(self, tenant: str): pass

class Halves(PartitionedTask):
    name, schedule = "halves", None
    async def split(self, bad: bool = False):
        return [Part(bad=False), Part(bad=bad)]
    async def work(self, part):
        if part["bad"]:
            raise ValueError("a bad half")
"""

ENDS = ("succeeded", "failed")

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples_of(text: str) -> Samples:
    """The values by name and labels, as a scraper reads them."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


class Scrape:
    """One answer. `scrape("batch_runs", state="queued")` is its value; None if it has none."""

    def __init__(self, text: str) -> None:
        self.samples = samples_of(text)

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.samples.get((name, frozenset(labels.items())))


@pytest.fixture(autouse=True)
def more_tasks(tmp_path: Path) -> None:
    (tmp_path / "tasks" / "more.py").write_text(MORE)


async def scrape(served: Served) -> Scrape:
    answer = await served.nobody.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith(
        "text/plain; version=0.0.4"
    )
    return Scrape(answer.text)


async def ended(served: Served, task: str, **params: Any) -> None:
    """A run of the task by hand, until it has ended."""
    run = await served.operations(StartRun(name=task, parameters=params))

    async def has_ended() -> bool:
        return (await served.operations(ShowRun(run=run.id))).state in ("succeeded", "failed")

    await until(has_ended)


async def put(served: Served) -> None:
    """Into the databases: runs that nobody claims, one of them held by a pause, items in
    quarantine, and a backup.
    """
    ago = clock.now() - timedelta(hours=1)
    items = [
        {
            "id": new_id(),
            "run": new_id(),
            "task": "load",
            "item": f"{n}",
            "error": {},
            "times": 1,
            "at": ago,
        }
        for n in range(3)
    ]
    items[0]["redriven_by"] = new_id()
    backup = {
        "name": "2026",
        "place": "here",
        "taken_at": ago,
        "verified_at": ago,
        "created_at": ago,
    }
    waiting = [new("elsewhere", exclusive=None, due_at=ago, created_at=ago) for _ in range(2)]
    later = new("elsewhere", state="retrying", due_at=clock.now() + timedelta(hours=1))
    long_ago = ago - timedelta(hours=5)
    held = new("held", due_at=long_ago, created_at=long_ago)
    after_the_pause = new("held", due_at=clock.now(), created_at=clock.now())
    paused = {
        "name": "held",
        "description": "",
        "source": "",
        "policies": {},
        "paused_at": ago,
        "paused_by": "ann",
    }
    async with served.service.ledger.engine.begin() as connection:
        await connection.execute(
            insert(tasks), {**paused, "first_seen_at": long_ago, "last_seen_at": ago}
        )
        await connection.execute(
            insert(runs), [vars(run) for run in [*waiting, later, held, after_the_pause]]
        )
        await connection.execute(insert(backups), backup)
    async with served.service.application.engine.begin() as connection:
        for item in items:
            await connection.execute(insert(quarantine), item)
    await served.operations(PauseTask(name="report"))


async def test_a_task_with_a_limit_has_gauges_without_its_keys(served: Served) -> None:
    for tenant in ("acme", "bolt"):
        await served.operations(StartRun(name="mail", parameters={"tenant": tenant}))
    got = await scrape(served)
    assert got("batch_limited_running", task="mail") == 0
    assert got("batch_limited_waiting", task="mail") == 2
    assert 0 <= (got("batch_limited_oldest_waiting_seconds", task="mail") or 0) < 60
    assert got("batch_limited_waiting", task="report") is None
    assert "acme" not in str(got.samples)


async def test_a_scrape_shows_what_the_process_has_done_and_what_the_ledger_has(
    served: Served,
) -> None:
    began = clock.now()
    await ended(served, "payroll")
    await ended(served, "load")
    for _ in range(2):
        await ended(served, "report", day="never")
    await put(served)
    metrics = served.service.metrics
    await until(
        lambda: asyncio.sleep(
            0, sum(metrics.start_delay.buckets().counts) > 0 and metrics.last_tick
        )
    )
    got = await scrape(served)

    assert got("batch_runs_total", task="payroll", outcome="succeeded", origin="manual") == 1
    assert got("batch_runs_total", task="report", outcome="failed", origin="manual") == 2
    assert got("batch_attempts_total", task="report", outcome="failed") == 2
    assert (got("batch_slots_total", fate="on_time") or 0) >= 1 and got(
        "batch_slots_total", fate="missed"
    ) == 0
    assert got("batch_items_total", task="load") == 5
    assert got("batch_run_duration_seconds_count", outcome="failed") == 2
    assert (got("batch_start_delay_seconds_bucket", le="21600.0") or 0) >= 1
    assert (got("batch_ledger_seconds_count", statement="write") or 0) >= 1
    for nothing in ("leases_lost", "fence_refused", "log_lines_dropped"):
        assert got(f"batch_{nothing}_total") == 0
    assert abs((got("batch_last_tick_timestamp_seconds") or 0) - clock.now().timestamp()) < 60

    assert got("batch_runs", state="queued") == 4 and got("batch_runs", state="retrying") == 1
    assert 3_600 <= (got("batch_oldest_waiting_seconds") or 0) < 3_700
    assert got("batch_nodes", state="living") == 1
    assert got("batch_unaccounted_slots") == 0
    assert (
        got("batch_task_paused", task="report") == 1
        and got("batch_task_paused", task="payroll") == 0
    )
    assert (
        got("batch_failure_streak", task="report") == 2
        and got("batch_failure_streak", task="payroll") == 0
    )
    assert (got("batch_last_success_timestamp_seconds", task="payroll") or 0) >= began.timestamp()
    assert got("batch_last_success_timestamp_seconds", task="report") is None
    assert got("batch_next_slot_timestamp_seconds", task="report") is None
    assert (got("batch_next_slot_timestamp_seconds", task="tick") or 0) > began.timestamp()
    assert (
        got("batch_quarantined_items", task="load") == 2
        and got("batch_quarantined_items", task="report") == 0
    )
    backup_at = got("batch_backup_last_verified_timestamp_seconds") or 0
    assert 3_600 <= clock.now().timestamp() - backup_at < 3_700
    assert got("batch_incidents_open", kind="unaccounted") == 0


async def test_a_partitioned_run_counts_once_and_its_parts_by_themselves(served: Served) -> None:
    await ended(served, "halves")
    await ended(served, "halves", bad=True)
    await until(lambda: asyncio.sleep(0, served.service.metrics.runs["halves", "failed", "manual"]))
    waiting = vars(new("elsewhere", state="waiting", gate="parts", exclusive=None))
    part = {"origin": "part", "awaited_by": waiting["id"], "parent": waiting["id"]}
    async with served.service.ledger.engine.begin() as connection:
        for row in (waiting, *(vars(new("elsewhere", exclusive=None)) | part for _ in range(3))):
            await connection.execute(insert(runs), row)
    got = await scrape(served)

    ends = {
        outcome: got("batch_runs_total", task="halves", outcome=outcome, origin="manual")
        for outcome in ENDS
    }
    assert ends == {"succeeded": 1, "failed": 1}
    assert {
        outcome: got("batch_parts_total", task="halves", outcome=outcome) for outcome in ENDS
    } == {
        "succeeded": 3,
        "failed": 1,
    }
    assert got("batch_runs_total", task="halves", outcome="succeeded", origin="part") is None
    outcomes = ("split", "succeeded", "failed")
    assert [got("batch_attempts_total", task="halves", outcome=each) for each in outcomes] == [
        2,
        4,
        1,
    ]
    durations = [got("batch_run_duration_seconds_count", outcome=each) for each in outcomes]
    assert (durations[0], durations[2]) == (2, None)
    assert [got("batch_part_duration_seconds_count", outcome=each) for each in outcomes] == [
        None,
        3,
        1,
    ]
    assert got("batch_failure_streak", task="halves") == 1
    assert [got(f"batch_{what}", state="queued") for what in ("runs", "parts")] == [0, 3]
    assert [got(f"batch_{what}", state="waiting") for what in ("runs", "parts")] == [1, 0]


async def test_many_scrapes_read_the_ledger_once_in_15_seconds_and_write_their_text_in_a_thread(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    threads: set[int] = set()
    render = exposition.render

    def rendered(*given: Any) -> bytes:
        threads.add(threading.get_ident())
        return render(*given)

    monkeypatch.setattr(exposition, "render", rendered)
    ledger = served.service.ledger.reader.sync_engine
    event.listen(ledger, "before_cursor_execute", lambda *given: sent.append(given[2]))

    def reads() -> int:
        return sum("AS streak" in statement for statement in sent)

    await asyncio.gather(*(scrape(served) for _ in range(10)))
    await scrape(served)
    assert reads() == 1
    served.service.gauges._read_at -= gauges.FRESH_SECONDS
    await scrape(served)
    assert reads() == 2
    assert threads and threading.get_ident() not in threads


async def test_a_ledger_that_does_not_answer_leaves_what_the_process_has_counted(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gauges, "PATIENCE_SECONDS", 0.0)
    got = await scrape(served)
    assert got("batch_running") is not None and got("batch_runs", state="queued") is None
    monkeypatch.undo()
    assert (await scrape(served))("batch_runs", state="queued") is not None


async def test_it_needs_a_token_or_this_machine_called_by_a_name_of_its_own(served: Served) -> None:
    elsewhere = {
        role: client_of(served.service_app, secret, "10.1.2.3")
        for role, secret in served.secrets.items()
    }
    for client in (*served.clients.values(), *elsewhere.values()):
        assert (
            await client.get("/metrics", headers={"Host": "a.name.of.a.monitor"})
        ).status_code == 200
    for host in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000"):
        assert (await served.nobody.get("/metrics", headers={"Host": host})).status_code == 200
    refused = [
        await served.nobody.get("/metrics", headers={"Host": "rebound.example"}),
        await served.nobody.get(
            "/metrics", headers={"Host": "rebound.example", "Authorization": "Bearer wrong"}
        ),
        await client_of(served.service_app, host="10.1.2.3").get("/metrics"),
    ]
    assert [answer.status_code for answer in refused] == [401] * 3


# What is computed from the rows

NOW = datetime(2026, 3, 10, 12, 0, 30, tzinfo=UTC)


def opened(
    task: str, behind: timedelta, paused_by: str | None = None, cron: str = "* * * * *"
) -> OpenSchedule:
    return OpenSchedule(
        new_id(), task, cron, "UTC", NOW - behind, paused_by, NOW - timedelta(days=1)
    )


def test_slots_that_nobody_has_handled_for_a_minute_are_late_except_those_of_paused_tasks() -> None:
    behind = timedelta(minutes=10)
    rows = [
        opened("stuck", behind),
        opened("fine", timedelta(seconds=20)),
        opened("paused", behind, "ann"),
    ]
    slots = gauges._slots([*rows, opened("unreadable", behind, cron="no cron")], NOW)
    assert slots.late == 9
    assert slots.next == {
        "stuck": NOW - timedelta(minutes=9, seconds=30),
        "fine": NOW + timedelta(seconds=30),
    }


def test_a_success_that_was_seen_is_kept_when_the_last_runs_have_all_failed() -> None:
    reader = gauges.GaugeReader(None, ProcessMetrics())  # type: ignore[arg-type]
    good = TaskGauges(NOW, None, 0, False, 0)
    reader._with_successes(ledger_with({"load": good, "gone": good}))
    failing = ledger_with({"load": replace(good, last_success_at=None, failure_streak=100)})
    assert reader._with_successes(failing).tasks["load"].last_success_at == NOW
    assert reader._successes == {"load": NOW}


# Labels


def process(**counted: Any) -> ProcessSnapshot:
    metrics = ProcessMetrics()
    snapshot = ProcessSnapshot.of(
        metrics, running_items={}, running_dropped=0, running=0, leases_lost=0, loop_lag=0.0
    )
    return replace(snapshot, **counted)


def ledger_with(tasks: Mapping[str, TaskGauges]) -> Gauges:
    return Gauges({}, 0.0, tasks, {}, 0, {}, None)


def test_tasks_without_a_label_of_their_own_are_other_with_the_worst_of_their_values() -> None:
    now = clock.now()
    labels = TaskLabels(most=1)
    labels.admit(["b", "a"])
    of_tasks = {
        "a": TaskGauges(now, now, 0, False, 1),
        "b": TaskGauges(now - timedelta(seconds=9), now + timedelta(seconds=9), 3, False, 2),
        "c": TaskGauges(now, None, 1, True, 4),
    }
    got = Scrape(exposition.render(process(), ledger_with(of_tasks), labels).decode())
    names = ("failure_streak", "task_paused", "quarantined_items")
    assert [got(f"batch_{name}", task="a") for name in names] == [0, 0, 1]
    assert [got(f"batch_{name}", task=OTHER) for name in names] == [3, 1, 6]
    oldest, next_slot = (now.timestamp() + seconds for seconds in (-9, 9))
    assert got("batch_last_success_timestamp_seconds", task=OTHER) == pytest.approx(
        oldest, abs=0.01
    )
    assert got("batch_next_slot_timestamp_seconds", task=OTHER) == pytest.approx(
        next_slot, abs=0.01
    )
    assert {dict(key[1])["task"] for key in got.samples if "task" in dict(key[1])} == {"a", OTHER}


def test_a_thousand_tasks_have_labels_and_the_counters_of_all_others_are_one() -> None:
    metrics = ProcessMetrics()
    for number in range(1_500):
        metrics.count_attempt(f"t-{number}", "succeeded", 0.1, "succeeded", "schedule")
    snapshot = replace(process(), runs=metrics.runs, attempts=metrics.attempts)
    got = Scrape(exposition.render(snapshot, None, metrics.labels).decode())
    counted = {
        dict(labels)["task"]: value
        for (name, labels), value in got.samples.items()
        if name == "batch_runs_total"
    }
    assert len(counted) == 1_001 and counted[OTHER] == 500


def test_a_label_can_not_break_the_text() -> None:
    labels = {('a"b\n\\', "sent"): 1}
    got = Scrape(exposition.render(process(notifications=labels), None, TaskLabels()).decode())
    assert got("batch_notifications_total", channel='a"b\n\\', outcome="sent") == 1
