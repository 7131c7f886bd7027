"""A forecast in sentences: what it says about a slot, and why. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from batch_system.batch.firing.pauses import NEVER
from batch_system.batch.incidents.forecast import FEW, Forecast, State, Step
from batch_system.batch.ledger.states import RunState

WORDS: dict[State, str] = {
    "late": "late",
    "at_risk": "at risk",
    "paused": "paused",
    "on_time": "on time",
    "unknown": "no forecast yet",
    "kept": "kept",
}
"""The states, the worst first."""
SLOWER = 1.25
"""A run that will take so many times as long as usual is called slow."""
_UNTIL = {
    "failed": "is mended",
    "cancelled": "is retried",
    "skipped": "is retried",
    "missed": "is backfilled",
    "paused": "is resumed",
    "gone": "is there again",
}


class Words:
    """Sentences about forecasts made at `now`, with times in a zone."""

    def __init__(self, now: datetime, zone: ZoneInfo) -> None:
        self._now = now
        self._zone = zone

    def title(self, forecast: Forecast) -> str:
        """Such as "report promised 08:00: about 08:20, 20 min late"."""
        promise, end = forecast.promise, forecast.ends_at
        return (
            f"{promise.task} promised {self.clock(promise.deadline)}: {self._what(forecast, end)}"
        )

    def _what(self, forecast: Forecast, end: datetime | None) -> str:
        deadline, obstacle = forecast.promise.deadline, forecast.obstacle
        if forecast.state == "paused":
            until = forecast.path[-1].usual.paused_until(deadline)
            return f"paused{'' if until in (None, NEVER) else f' until {self.clock(until)}'}"
        if end is not None:
            early, late = deadline - end, end - deadline
            is_there = forecast.path[-1].is_over
            when = f"{'was there' if is_there else 'about'} {self.clock(end)}"
            if forecast.state == "late":
                return f"{when}, {length(late)} late"
            return f"{when}, {length(early)} early" if is_there else when
        if obstacle is not None:
            name = "it" if obstacle is forecast.path[-1] else obstacle.task
            if obstacle.obstacle not in _UNTIL:
                return f"{name} will be skipped"
            if _paused_until(obstacle) is not None:
                return f"not before {name} is backfilled"
            return f"not before {name} {_UNTIL[obstacle.obstacle]}"
        if forecast.state == "late":
            return f"{length(self._now - deadline)} late"
        return WORDS["unknown"]

    def detail(self, forecast: Forecast, *, has_progress: bool = True) -> str:
        """Why, in one or two sentences; empty if there is nothing to say. `has_progress`: whether
        the reader may see how far runs are.
        """
        if forecast.state in ("kept", "on_time", "paused"):
            return ""
        return " ".join(
            filter(
                None,
                (
                    self._obstacle(forecast),
                    *(self._slow(step, has_progress) for step in forecast.path),
                    self._chain(forecast.path),
                    self._retry(forecast),
                    self._unknown(forecast.path[-1]),
                ),
            )
        )

    def _obstacle(self, forecast: Forecast) -> str:
        step = forecast.obstacle
        if step is not None and (until := _paused_until(step)) is not None:
            name = "It" if step is forecast.path[-1] else step.task
            is_over = until <= self._now
            return f"{name} {'was' if is_over else 'is'} paused until {self.clock(until)}."
        if step is None or step.obstacle not in ("overlap", "waited") or step.before is None:
            return ""
        if step.obstacle == "overlap":
            return f"Its run before goes on until about {self._end(step.before)}."
        return f"It does not wait so long: {step.before.task} ends about {self._end(step.before)}."

    def _end(self, step: Step) -> str:
        return self.clock(step.ends_at) if step.ends_at is not None else "later"

    def _slow(self, step: Step, has_progress: bool) -> str:
        run, usual = step.run, step.usual.p50
        if run is None or run.state != RunState.RUNNING or not run.began_at or not usual:
            return ""
        elapsed = self._now - run.began_at
        whole = (step.ends_at or self._now) - run.began_at
        times = whole.total_seconds() / usual
        if times < SLOWER:
            return ""
        share = (
            f"{100 * run.done // run.total} % after {length(elapsed)}"
            if has_progress and run.done is not None and run.total
            else f"{length(elapsed)} so far"
        )
        usually = length(timedelta(seconds=usual))
        return f"{step.task} takes {times:.2g} times as long as usual: {share}, usual is {usually}."

    def _chain(self, path: Sequence[Step]) -> str:
        """What the slot waits for, as far as it has not succeeded."""
        left = [step for step in path if not step.is_over]
        links = [
            f"{step.task}{f' {self.clock(step.slot)}' if step.slot is not None else ''}"
            for step in left[-2::-1]
        ]
        if not links:
            return ""
        return f"It waits for {', which waits for '.join(links)}."

    def _retry(self, forecast: Forecast) -> str:
        until, step = forecast.retry_until, forecast.obstacle
        if until is None or step is None or step.obstacle not in _UNTIL:
            return ""
        if forecast.state == "at_risk" and until > self._now:
            how = "a retry" if step.obstacle in ("failed", "cancelled", "skipped") else "that"
            return f"With {how} by {self.clock(until)} it can still be there."
        return ""

    def _unknown(self, step: Step) -> str:
        if step.unknown is None:
            return ""
        return f"There are fewer than {FEW} successful runs of {step.unknown}."

    def clock(self, at: datetime) -> str:
        """A time of day, with the day if it is not today."""
        local, today = at.astimezone(self._zone), self._now.astimezone(self._zone).date()
        if local.date() == today:
            return f"{local:%H:%M}"
        is_near = abs((local.date() - today).days) < 7
        return f"{local:%a %H:%M}" if is_near else f"{local:%d %b %H:%M}"


def _paused_until(step: Step) -> datetime | None:
    """When the pause of a slot ends by itself that will not run because of it."""
    if step.obstacle != "paused" or step.run is not None or step.slot is None:
        return None
    until = step.usual.paused_until(step.slot)
    return until if until != NEVER else None


def length(duration: timedelta) -> str:
    """A length of time in short, such as "1 h 49 min"."""
    seconds = max(0, round(duration.total_seconds()))
    if seconds < 60:
        return f"{seconds} s"
    hours, minutes = divmod(seconds // 60, 60)
    if not hours:
        return f"{minutes} min"
    return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"


def summary(numbers: dict[State, int]) -> str:
    """Such as "1 of 4 promises will be late, 1 is at risk."; empty without such ones."""
    late, risky, all_of_them = numbers["late"], numbers["at_risk"], sum(numbers.values())
    parts = [f"{late:,} of {_promises(all_of_them)} {'is' if late == 1 else 'are'} late"]
    if late and risky:
        return f"{parts[0]}, {risky:,} {'is' if risky == 1 else 'are'} at risk."
    if risky:
        return f"{risky:,} of {_promises(all_of_them)} {'is' if risky == 1 else 'are'} at risk."
    return f"{parts[0]}." if late else ""


def _promises(number: int) -> str:
    return f"{number:,} promise{'' if number == 1 else 's'}"
