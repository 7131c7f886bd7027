"""The metrics as the text that Prometheus reads. Only this module knows prometheus_client, whose
import takes long.

The names, types and labels of all metrics stand here. Values that come from authors or from rows
never become labels, except for the names of at most 1,000 tasks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from batch_system.metrics.process import (
    BOUNDS,
    Buckets,
    ProcessMetrics,
    ProcessSnapshot,
    TaskLabels,
)
from batch_system.operations.system.gauges import Gauges, PoolGauges, TaskGauges

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The text format of Prometheus. OpenMetrics is not offered: it has no counter and gauge of one
name (`batch_runs`).
"""

_BOUNDS = tuple(map(str, BOUNDS))


def render(process: ProcessSnapshot, gauges: Gauges | None, labels: TaskLabels) -> bytes:
    """The text for one scrape. It takes some milliseconds, so call it in a thread. `gauges`: None
    if not known.
    """
    return _text(_of_process(process)) + (
        _text_of_ledger(gauges, labels) if gauges is not None else b""
    )


@lru_cache(maxsize=4)
def _text_of_ledger(gauges: Gauges, labels: TaskLabels) -> bytes:
    """Cached, because the gauges of the ledger are most of the text, and do not change until they
    are read again.
    """
    return _text([*_ledger_gauges(gauges), *_task_gauges(gauges.tasks, labels)])


def families() -> tuple[list[Metric], list[Metric]]:
    """All metrics without values, those of the process and those of the ledger: their names, types,
    labels and texts.
    """
    process = ProcessSnapshot.of(
        ProcessMetrics(), running_items={}, running_dropped=0, running=0, leases_lost=0, loop_lag=0
    )
    ledger = Gauges({}, 0.0, {}, {}, 0, {}, None)
    return list(_of_process(process)), [*_ledger_gauges(ledger), *_task_gauges({}, TaskLabels())]


def _text(metrics: Iterable[Metric]) -> bytes:
    """Each scrape has its own registry, so that several services can live in one process."""
    registry = CollectorRegistry()
    registry.register(_Collected(metrics))
    return generate_latest(registry)


class _Collected(Collector):
    """A collector of metrics that exist already."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that the registry does not collect all metrics only to learn their names."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The metrics."""
        return self._metrics


def _of_process(process: ProcessSnapshot) -> Iterator[Metric]:
    yield from _counters(process)
    yield from _histograms(process)
    yield from _process_gauges(process)


# Of this process.


def _counters(process: ProcessSnapshot) -> Iterator[Metric]:
    yield _counter(
        "batch_runs",
        "Runs that have ended in this process, by final state (outcome) and origin.",
        ("task", "outcome", "origin"),
        process.runs,
    )
    yield _counter(
        "batch_parts",
        "Parts of runs that have ended in this process.",
        ("task", "outcome"),
        process.parts,
    )
    yield _counter(
        "batch_attempts",
        "Attempts that have ended in this process.",
        ("task", "outcome"),
        process.attempts,
    )
    yield _counter(
        "batch_slots", "Slots that were fired by this process.", ("fate",), _by_one(process.slots)
    )
    yield _counter(
        "batch_items",
        "Items in chunks that runs in this process have committed.",
        ("task",),
        _by_one(process.items),
    )
    yield _counter(
        "batch_notifications",
        "Tries of this process to send a message about an incident.",
        ("channel", "outcome"),
        process.notifications,
    )
    yield from _troubles(process)


def _troubles(process: ProcessSnapshot) -> Iterator[Metric]:
    yield _single(
        CounterMetricFamily,
        "batch_leases_lost",
        "How often this process has lost its lease.",
        process.leases_lost,
    )
    yield _counter(
        "batch_failed_parts",
        "Parts of this process that can't go on, so that it ends, by their names.",
        ("part",),
        _by_one(process.failed_parts),
    )
    yield _single(
        CounterMetricFamily,
        "batch_fence_refused",
        "Writes of runs that were refused, because another node may hold the run.",
        process.refused,
    )
    yield _single(
        CounterMetricFamily,
        "batch_log_lines_dropped",
        "Log lines of runs that are not in the ledger, because they came faster than it takes "
        "them.",
        process.dropped_lines,
    )


def _histograms(process: ProcessSnapshot) -> Iterator[Metric]:
    yield _histogram(
        "batch_run_duration_seconds",
        "Duration of the attempts that have ended in this process, without those of parts.",
        "outcome",
        process.durations,
    )
    yield _histogram(
        "batch_part_duration_seconds",
        "Duration of the attempts of parts that have ended in this process.",
        "outcome",
        process.part_durations,
    )
    yield _histogram(
        "batch_start_delay_seconds",
        "From a slot to the first line of its run, for slots that were fired on time.",
        None,
        {"": process.start_delay},
    )
    yield _histogram(
        "batch_ledger_seconds",
        "Duration of the transactions on the ledger, by what they do.",
        "statement",
        process.ledger,
    )


def _process_gauges(process: ProcessSnapshot) -> Iterator[Metric]:
    gauge = GaugeMetricFamily
    yield _single(
        gauge, "batch_running", "Attempts that this process executes now.", process.running
    )
    yield _single(
        gauge,
        "batch_loop_lag_seconds",
        "How long a callback last waited on the loop.",
        process.loop_lag,
    )
    text = "When the event loop last got what the heartbeat had read from the ledger (Unix time)."
    yield _single(gauge, "batch_last_tick_timestamp_seconds", text, _timestamp(process.last_tick))


# Of the ledger.


def _ledger_gauges(gauges: Gauges) -> Iterator[Metric]:
    gauge = GaugeMetricFamily
    yield _gauge(
        "batch_runs", "Active runs by state, each counted up to 10,000.", "state", gauges.runs
    )
    yield _gauge(
        "batch_parts",
        "Active parts of runs by state, each counted up to 10,000.",
        "state",
        gauges.parts,
    )
    text = "How long the run waits that could have started first of all; 0 if none waits."
    yield _single(gauge, "batch_oldest_waiting_seconds", text, gauges.oldest_waiting)
    yield _gauge("batch_incidents_open", "Open incidents.", "kind", gauges.incidents)
    text = (
        "Slots that no process has handled for more than a minute, and slots without run, skip "
        "and missed range."
    )
    yield _single(gauge, "batch_unaccounted_slots", text, gauges.unaccounted)
    yield from _pool_gauges(gauges.pools)
    yield _gauge("batch_nodes", "Processes that fire schedules, by state.", "state", gauges.nodes)
    text, verified_at = (
        "When the newest verified backup was taken (Unix time).",
        _timestamp(gauges.verified_backup_at),
    )
    yield _single(gauge, "batch_backup_last_verified_timestamp_seconds", text, verified_at)


def _pool_gauges(pools: Mapping[str, PoolGauges]) -> Iterator[Metric]:
    text = (
        "Runs of the pool that are going on or may start now; those that wait are counted up to "
        "1,000 of each task."
    )
    yield _gauge(
        "batch_pool_wanted", text, "pool", {name: pool.wanted for name, pool in pools.items()}
    )
    text = "Runs of the pool that are going on."
    yield _gauge(
        "batch_pool_running", text, "pool", {name: pool.running for name, pool in pools.items()}
    )
    text = "How many runs the living nodes that claim the pool execute at once, at most."
    yield _gauge(
        "batch_pool_places", text, "pool", {name: pool.places for name, pool in pools.items()}
    )


Fold = Callable[[float, float], float]


def _task_gauges(tasks: Mapping[str, TaskGauges], labels: TaskLabels) -> Iterator[Metric]:
    """The gauges of each task. Tasks without a label of their own share one, whose value is the
    worst of theirs.
    """
    by_label = [(labels.of(name), task) for name, task in tasks.items()]

    def of_tasks(
        name: str, text: str, value: Callable[[TaskGauges], float | None], fold: Fold
    ) -> Metric:
        values: dict[str, float] = {}
        for label, task in by_label:
            if (number := value(task)) is not None:
                values[label] = fold(values[label], number) if label in values else number
        return _gauge(name, text, "task", values)

    yield of_tasks(
        "batch_last_success_timestamp_seconds",
        "When the newest run that has succeeded ended (Unix time).",
        lambda task: _timestamp(task.last_success_at),
        min,
    )
    yield of_tasks(
        "batch_next_slot_timestamp_seconds",
        "The first slot that was not handled yet (Unix time); none while the task is paused.",
        lambda task: _timestamp(task.next_slot),
        min,
    )
    text = "Failed runs since the last success, among the 100 newest runs."
    yield of_tasks("batch_failure_streak", text, lambda task: task.failure_streak, max)
    yield of_tasks(
        "batch_task_paused",
        "1 if the task is paused, otherwise 0.",
        lambda task: float(task.is_paused),
        max,
    )
    text = "Items in quarantine that wait for a redrive, among the 10,000 that were set aside last."
    yield of_tasks("batch_quarantined_items", text, lambda task: task.quarantined, operator.add)
    text = "Runs that are going on of a task with a limit or a rate, over all its keys."
    yield of_tasks("batch_limited_running", text, _of_limit("running"), operator.add)
    text = "Runs that wait of such a task, over all its keys, counted up to 1,000."
    yield of_tasks("batch_limited_waiting", text, _of_limit("waiting"), operator.add)
    text = "How long the run of such a task waits that was made first; 0 if none waits."
    yield of_tasks(
        "batch_limited_oldest_waiting_seconds",
        text,
        lambda task: task.waits if task.limited is not None else None,
        max,
    )


def _of_limit(field: str) -> Callable[[TaskGauges], float | None]:
    return lambda task: getattr(task.limited, field) if task.limited is not None else None


# Families.


def _by_one(values: Mapping[str, int]) -> dict[tuple[str, ...], int]:
    return {(label,): value for label, value in values.items()}


def _counter(name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in sorted(values.items()):
        family.add_metric(key, value)
    return family


def _gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _single(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    text: str,
    value: float | None,
) -> Metric:
    """A metric with one value and without labels. `value`: None if there is none now."""
    return kind(name, text, value=value)


def _histogram(name: str, text: str, label: str | None, values: Mapping[str, Buckets]) -> Metric:
    """`label`: the name of its only label; None if it has none."""
    family = HistogramMetricFamily(name, text, labels=[label] if label is not None else [])
    for key, buckets in sorted(values.items()):
        counted, cumulated = 0, []
        for bound, number in zip((*_BOUNDS, "+Inf"), buckets.counts, strict=True):
            counted += number
            cumulated.append((bound, float(counted)))
        family.add_metric([key] if label is not None else [], cumulated, sum_value=buckets.total)
    return family


def _timestamp(at: datetime | None) -> float | None:
    return at.timestamp() if at is not None else None
