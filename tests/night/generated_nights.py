"""Made-up nights, each from a seed, to try the forecast on: what happens in them is decided before,
and at any moment of a night the forecast gets only what the ledger would have then.

A night has chains of tasks, with deadlines that people might set: rounded, with some slack. It goes
wrong in some places: runs are slow, attempts fail and are tried again, runs fail for good and a
person retries them after a while or not at all, the service is away for some time, and places are
scarce.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from batch_system.batch.incidents.forecast import (
    Facts,
    Forecast,
    KnownRun,
    KnownTask,
    Promise,
    Room,
    Slot,
    forecasts,
)
from batch_system.batch.ledger.states import RunState

BEGIN = datetime(2026, 3, 9, 18, 0, tzinfo=UTC)
NIGHT = 14 * 3600
LOOK = 300
"""The forecast is asked each five minutes."""
IN_TIME = 15 * 60
"""A warning comes at least so long before the deadline."""


@dataclass
class Try:
    """An attempt: when it begins and ends, and whether it succeeds."""

    begin: float
    end: float
    is_good: bool
    by_person: bool = False


@dataclass
class Work:
    """A slot of a task, what it waits for, and what happens to it."""

    task: str
    slot: float
    after: list[Work]
    seconds: list[float]
    """How long its attempts would take; all but the last one fail."""
    pauses: list[float]
    """How long after each failed attempt the next one begins."""
    is_mended: bool
    """Whether the attempt after the retries of the policy comes from a person."""
    fails: bool
    """Whether also the last attempt fails."""
    has_progress: bool
    noise: float
    tries: list[Try] = field(default_factory=list)
    ready: float | None = None

    @property
    def good_at(self) -> float | None:
        return self.tries[-1].end if self.tries and self.tries[-1].is_good else None


@dataclass
class Night:
    tasks: dict[str, KnownTask]
    works: list[Work]
    promises: list[tuple[Work, float]]
    places: int
    away: tuple[float, float]


def made(seed: int) -> Night:
    """The night of a seed, with all that happens in it."""
    dice = random.Random(seed)
    night = Night({}, [], [], dice.randint(6, 12), (0.0, 0.0))
    if dice.random() < 0.15:
        begin = dice.uniform(0, NIGHT - 3600)
        night.away = (begin, begin + dice.uniform(300, 2_400))
    for number in range(dice.randint(5, 8)):
        _add_chain(night, dice, number)
    _happen(night)
    return night


def _add_chain(night: Night, dice: random.Random, number: int) -> None:
    begin = dice.randrange(0, NIGHT - 5 * 3600, 900)
    before: list[Work] = []
    for link in range(dice.randint(1, 5)):
        name = f"task_{number}_{link}"
        usual = dice.lognormvariate(6.8, 1.0)
        spread = dice.uniform(0.04, 0.35)
        past = sorted(usual * dice.lognormvariate(0, spread) for _ in range(100))
        night.tasks[name] = KnownTask(p50=past[49], p95=past[94], successes=100, within=86_400)
        after = list(before)
        if link and night.works and dice.random() < 0.2:
            other = dice.choice(night.works)
            after += [other] if other not in after else []
        slot = begin if dice.random() < 0.8 else begin + dice.randrange(0, 3600, 900)
        slot = max([slot, *(each.slot for each in after)])
        work = _fate(dice, name, slot, after, usual, spread)
        night.works.append(work)
        before = [work] if dice.random() < 0.8 else [*before, work]
    _promise(night, dice, night.works[-1])


def _fate(
    dice: random.Random, name: str, slot: float, after: list[Work], usual: float, spread: float
) -> Work:
    """What becomes of a slot: in one of twenty something goes wrong."""

    def takes() -> float:
        return usual * dice.lognormvariate(0, spread)

    seconds, pauses, is_mended, fails = [takes()], [], False, False
    wrong = dice.random()
    if wrong < 0.02:
        seconds = [takes() * dice.uniform(1.5, 5)]
    elif wrong < 0.05:
        retries = dice.randint(0, 3)
        wait = dice.choice((30.0, 30.0, 30.0, 300.0, 1_200.0))  # most leave it at the default
        pauses = [min(3_600.0, wait * 2.0**number) for number in range(retries)]
        seconds = [takes() * dice.random() ** 2 for _ in range(retries + 1)]  # most fail early
        if dice.random() < 0.5 and retries:
            seconds[-1] = takes()
        elif dice.random() < 0.7:
            is_mended = True
            pauses.append(dice.uniform(600, 4 * 3600))
            seconds.append(takes())
        else:
            fails = True
    has_progress, noise = dice.random() < 0.5, dice.uniform(0, 0.15)
    return Work(name, slot, after, seconds, pauses, is_mended, fails, has_progress, noise)


def _promise(night: Night, dice: random.Random, last: Work) -> None:
    """A deadline that is longer than the usual duration of the chain by a fifth to its double, and
    at least by half an hour, to a whole quarter of an hour.
    """

    def usual_end(work: Work) -> float:
        begin = max([work.slot, *(usual_end(each) for each in work.after)])
        return begin + (night.tasks[work.task].p50 or 0)

    usual = usual_end(last) - last.slot
    deadline = last.slot + max(usual * dice.uniform(1.2, 2.0), usual + 1_800)
    night.promises.append((last, -(-deadline // 900) * 900))


def _happen(night: Night) -> None:
    """Decide when each attempt begins and ends: there are only so many places, the first that is
    ready begins first, and nothing begins while the service is away.
    """
    events: list[tuple[float, int, int, str]] = []
    index = {id(work): number for number, work in enumerate(night.works)}
    free, queue, left = night.places, [], {}
    for number, work in enumerate(night.works):
        left[number] = {index[id(each)] for each in work.after}
        heapq.heappush(events, (_back(night, work.slot), 1, number, "due"))
    is_due: set[int] = set()
    while events:
        now, _, number, what = heapq.heappop(events)
        work = night.works[number]
        if what == "end":
            free += 1
            attempt = work.tries[-1]
            if attempt.is_good:
                for other, waits in left.items():
                    waits.discard(number)
                    if not waits and other in is_due:
                        is_due.discard(other)
                        heapq.heappush(events, (_back(night, now), 2, other, "ready"))
            elif len(work.tries) <= len(work.pauses):
                at = now + work.pauses[len(work.tries) - 1]
                heapq.heappush(events, (_back(night, at), 2, number, "ready"))
        elif what == "due":
            if left[number]:
                is_due.add(number)
            else:
                heapq.heappush(events, (now, 2, number, "ready"))
        else:
            work.ready = now if work.ready is None else work.ready
            queue.append(number)
        while free and queue:
            following = night.works[queue.pop(0)]
            free -= 1
            done = len(following.tries)
            is_last = done == len(following.seconds) - 1
            end = now + following.seconds[done]
            following.tries.append(
                Try(now, end, is_last and not following.fails, is_last and following.is_mended)
            )
            heapq.heappush(events, (end, 0, index[id(following)], "end"))


def _back(night: Night, at: float) -> float:
    """The first instant from then on at which the service is there."""
    begin, end = night.away
    return end if begin <= at < end else at


def at(seconds: float) -> datetime:
    return BEGIN + timedelta(seconds=seconds)


def facts_at(night: Night, now: float) -> Facts:
    """What the ledger would have."""
    runs: dict[Slot, KnownRun] = {}
    running, queue = [], []
    for work in night.works:
        run = _run_at(night, work, now)
        if run is None:
            continue
        runs[work.task, at(work.slot)] = run
        if run.state == RunState.RUNNING:
            running.append((work.task, run))
        elif run.state == RunState.QUEUED:
            queue.append((work.task, run))
    queue.sort(key=lambda each: each[1].due_at)
    before = {
        (work.task, at(work.slot)): [(each.task, at(each.slot)) for each in work.after]
        for work in night.works
    }
    full = {"default": Room(running, queue)} if len(running) >= night.places else {}
    return Facts(at(now), night.tasks, runs, before, {}, full)


def _run_at(night: Night, work: Work, now: float) -> KnownRun | None:
    if _back(night, work.slot) > now:
        return None
    due = at(work.slot)
    begun = [each for each in work.tries if each.begin <= now]
    ended = [each for each in begun if each.end <= now]
    if len(begun) > len(ended):
        return _running(work, begun[-1], now)
    if ended and ended[-1].is_good:
        times = {"began_at": at(ended[-1].begin), "ended_at": at(ended[-1].end)}
        return KnownRun(work.task, RunState.SUCCEEDED, due, **times)
    if ended:
        waits_for_person = len(ended) == len(work.pauses) + (0 if work.is_mended else 1)
        if waits_for_person:
            ready = ended[-1].end + work.pauses[-1] if work.is_mended else now + 1
            if ready > now:
                return KnownRun(work.task, RunState.FAILED, due, ended_at=at(ended[-1].end))
            return KnownRun(work.task, RunState.QUEUED, at(ready))
        ready = ended[-1].end + work.pauses[len(ended) - 1]
        return KnownRun(work.task, RunState.RETRYING, at(ready))
    if work.ready is not None and work.ready <= now:
        return KnownRun(work.task, RunState.QUEUED, at(work.ready))
    if _has_failed_before(night, work, now):
        return KnownRun(work.task, RunState.SKIPPED, due)
    return KnownRun(work.task, RunState.WAITING, due)


def _has_failed_before(night: Night, work: Work, now: float) -> bool:
    states = [run.state for each in work.after if (run := _run_at(night, each, now)) is not None]
    return any(state in (RunState.FAILED, RunState.SKIPPED) for state in states)


def _running(work: Work, attempt: Try, now: float) -> KnownRun:
    """A running run. Its rate is about that of the whole attempt; it fails without a warning."""
    whole = work.seconds[-1] if not attempt.is_good else attempt.end - attempt.begin
    done = int(100_000 * min(0.999, (now - attempt.begin) / whole))
    progress = {}
    if work.has_progress and now > attempt.begin:
        wave = 1 + work.noise * random.Random(f"{work.task} {now}").uniform(-1, 1)
        progress = {"done": done, "total": 100_000, "rate": 100_000 / whole * wave}
    begun = at(attempt.begin)
    return KnownRun(work.task, RunState.RUNNING, at(work.slot), begun, **progress)


@dataclass
class Score:
    """What became of the promises of some nights.

    `foreseen`: broken ones of which the forecast said so when 15 minutes were left. `false`: kept
    ones that it has called late or at risk at any time, although no person has helped. `rescued`:
    those that a person has helped.
    """

    nights: int = 0
    promises: int = 0
    broken: int = 0
    foreseen: int = 0
    false: int = 0
    rescued: int = 0
    names: list[str] = field(default_factory=list)
    """The seed and the task of each promise that was not foreseen, or falsely called."""


def scored(seeds: range) -> Score:
    score = Score()
    for seed in seeds:
        night = made(seed)
        score.nights += 1
        said: dict[int, list[tuple[float, Forecast]]] = {}
        for now, found in asked(night):
            for forecast, number in found:
                said.setdefault(number, []).append((now, forecast))
        for number, (work, deadline) in enumerate(night.promises):
            _count(score, night, seed, work, deadline, said.get(number, []))
    return score


def asked(night: Night) -> Iterator[tuple[float, list[tuple[Forecast, int]]]]:
    """The forecasts of a night, each five minutes, of the deadlines that are still to come."""
    last = max(deadline for _, deadline in night.promises)
    now = 0.0
    while now < last:
        meant = [
            number
            for number, (work, deadline) in enumerate(night.promises)
            if now < deadline <= now + 12 * 3600
            and not (work.good_at is not None and work.good_at <= now)
        ]
        if meant:
            promises = [
                Promise(work.task, at(work.slot), at(deadline))
                for work, deadline in (night.promises[number] for number in meant)
            ]
            yield now, list(zip(forecasts(facts_at(night, now), promises), meant, strict=True))
        now += LOOK


def _count(
    score: Score,
    night: Night,
    seed: int,
    work: Work,
    deadline: float,
    said: list[tuple[float, Forecast]],
) -> None:
    score.promises += 1
    is_broken = work.good_at is None or work.good_at > deadline
    warned = [(now, each) for now, each in said if each.state in ("late", "at_risk")]
    if is_broken:
        score.broken += 1
        in_time = [each for now, each in said if now <= deadline - IN_TIME]
        if in_time and in_time[-1].state in ("late", "at_risk"):
            score.foreseen += 1
        else:
            score.names.append(f"unforeseen: {seed} {work.task}")
    elif warned:
        if any(each.by_person for one in _chain(work) for each in one.tries):
            score.rescued += 1
        else:
            score.false += 1
            score.names.append(f"false: {seed} {work.task}")


def _chain(work: Work) -> Iterator[Work]:
    yield work
    for each in work.after:
        yield from _chain(each)
