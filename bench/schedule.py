"""What does one `next` cost? Schedule beside cronsim, croniter and APScheduler, walking forward
slot by slot.

    python bench/schedule.py [--slots 300] [--repeats 7]

Every repeat runs all of them in turn, so that a slow moment of the machine hits each. The tables
show the median of the repeats and, in brackets, the fastest. "known" asks Schedule again before the
slot that it found last, as every further task with the same expression does.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from zoneinfo import ZoneInfo

from apscheduler.triggers.cron import CronTrigger
from croniter import croniter
from cronsim import CronSim

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batch_system.batch.cron.cron import Schedule

START = datetime(2026, 1, 1, tzinfo=UTC)
ZONES = ["UTC", "Europe/Berlin"]
CRONS = ["* * * * *", "*/5 * * * *", "0 * * * *", "30 2 * * *", "0 9 * * 1-5", "0 0 1 * *"]
Walk = Callable[[str, str], Iterator[object]]


def start_in(zone: str) -> datetime:
    """cronsim has a fast path for datetime's own UTC."""
    return START if zone == "UTC" else START.astimezone(ZoneInfo(zone))


def ours(cron: str, zone: str) -> Iterator[object]:
    schedule, slot = Schedule(cron, zone), START
    while (found := schedule.next(slot)) is not None:
        slot = found
        yield slot


def ours_known(cron: str, zone: str) -> Iterator[object]:
    schedule = Schedule(cron, zone)
    schedule.next(START)
    while True:
        yield schedule.next(START)


def cronsim_aware(cron: str, zone: str) -> Iterator[object]:
    return CronSim(cron, start_in(zone))


def croniter_aware(cron: str, zone: str) -> Iterator[object]:
    yield from croniter(cron, start_in(zone), ret_type=datetime)


def apscheduler(cron: str, zone: str) -> Iterator[object]:
    trigger, slot = CronTrigger.from_crontab(cron, start_in(zone).tzinfo), start_in(zone)
    while True:
        slot = trigger.get_next_fire_time(slot, slot + timedelta(microseconds=1))
        yield slot


WALKS: dict[str, Walk] = {
    "Schedule": ours,
    "known": ours_known,
    "cronsim": cronsim_aware,
    "croniter": croniter_aware,
    "apscheduler": apscheduler,
}


def microseconds(walk: Walk, cron: str, zone: str, slots: int) -> float:
    """For one `next`; what the first one needs, parsing above all, is not counted."""
    walking = walk(cron, zone)
    next(walking)
    start = time.perf_counter()
    for _ in islice(walking, slots):
        pass
    return (time.perf_counter() - start) / slots * 1e6


def measure(slots: int, repeats: int) -> dict[tuple[str, str, str], list[float]]:
    measured: dict[tuple[str, str, str], list[float]] = {}
    for _ in range(repeats):
        for zone in ZONES:
            for cron in CRONS:
                for name, walk in WALKS.items():
                    measured.setdefault((zone, cron, name), []).append(
                        microseconds(walk, cron, zone, slots)
                    )
    return measured


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def print_table(title: str, rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{title}")
    for row in rows:
        cells = [
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--slots", type=int, default=300, help="slots that each repeat walks")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print(
        f"{cpu()}, {os.cpu_count()} cores; {platform.python_implementation()} "
        f"{platform.python_version()}"
    )
    print(
        ", ".join(
            f"{name} {version(name)}" for name in ("cronsim", "croniter", "apscheduler", "tzdata")
        )
    )
    measured = measure(options.slots, options.repeats)
    times, ratios = [["zone", "cron", *WALKS]], [["zone", "cron", *list(WALKS)[2:]]]
    for zone in ZONES:
        for cron in CRONS:
            costs = {name: measured[zone, cron, name] for name in WALKS}
            times.append(
                [zone, cron, *(f"{median(cost):.1f} ({min(cost):.1f})" for cost in costs.values())]
            )
            base = min(costs["Schedule"])
            ratios.append(
                [zone, cron, *(f"{min(costs[name]) / base:.2f}x" for name in ratios[0][2:])]
            )
    print_table(
        f"µs per next: median (fastest) of {options.repeats} repeats of {options.slots} slots",
        times,
    )
    print_table(
        "times as long as Schedule, by the fastest repeats, which other load disturbs least", ratios
    )


if __name__ == "__main__":
    main()
