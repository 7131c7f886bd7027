"""Describes the progress of a run as text."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batch_system.operations.asking.results import RunNow

Row = Mapping[str, Any]

RATES = {"s": 1, "min": 60, "h": 3600}


def words(run: Row, now: datetime) -> list[str]:
    """The known numbers of a run: done of total, percent, rate, time left. `now`: the ledger's
    time.
    """
    count, total = run["count"], run["total"]
    if count is None:
        return []
    numbers = [
        f"{count:,}" if total is None else f"{count:,} of {total:,}",
        percent(run),
        rate(run["rate"]),
    ]
    if run["eta"] is not None:
        numbers.append(f"{duration((run['eta'] - now).total_seconds())} left")
    return [number for number in numbers if number]


def percent(run: Row) -> str | None:
    """A percentage, rounded down, so that 100 % means that everything is done."""
    count, total = run["count"], run["total"]
    if count is None or not total or count > total:
        return None
    tenths = 1000 * count // total
    return f"{tenths / 10:.1f} %" if tenths < 1000 else "100 %"


def brief(run: Row) -> str | None:
    """The text of the column `progress`."""
    count = run["count"]
    return percent(run) or (f"{count:,}" if count is not None else None)


def rate(per_second: float | None) -> str | None:
    """The rate, by the smallest unit of time in which at least one item is done."""
    if per_second is None:
        return None
    if not per_second:
        return "0 items/s"
    unit = next((unit for unit, seconds in RATES.items() if per_second * seconds >= 1), "h")
    number = per_second * RATES[unit]
    return f"{number:,.0f} items/{unit}" if number >= 100 else f"{number:.1f} items/{unit}"


def duration(seconds: float) -> str:
    """A duration in its two largest units, such as 1 min 11 s."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days:,} d {hour:02} h"
    if hours:
        return f"{hours} h {minute:02} min"
    return f"{minutes} min {second:02} s" if minutes else f"{second} s"


def print_end(run: RunNow, as_json: bool) -> None:
    """Print how a run has ended, and its result: as two lines, or the run as JSON."""
    from batch_system import console

    if as_json:
        console.show_json(run)
        return
    console.say(ending(run.model_dump()))
    if run.result is not None:
        console.show_json(run.result)


def ending(run: Row) -> str:
    """The line about a run that has ended: its state, its duration and its reason."""
    from batch_system import console

    took = console.duration(run["started_at"], run["finished_at"])
    return f"run {run['id']} {run['state']}{took}" + (f": {run['reason']}" if run["reason"] else "")
