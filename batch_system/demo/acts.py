"""What happens to single runs of the story: they fail, are retried, are started by hand, or
wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from batch_system import clock
from batch_system.batch.ledger.run_logs import LogLine
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.states import RunState
from batch_system.demo.cast import PARTS
from batch_system.demo.failing import failure_of
from batch_system.demo.times import SHORTLY
from batch_system.demo.writing import Stage, info
from batch_system.operations.asking.filter import RunFilter
from batch_system.operations.bulks.bulk import carry_out
from batch_system.verbs.bulks import BeginBulk, PreviewBulk
from batch_system.verbs.run_changes import CancelRun, RetryRun, StartRun

SECOND = timedelta(seconds=1)


@dataclass
class Told:
    """A slot whose run has failed. `says`: what its code logged before. `more`: values of its
    outcome.

    `by` retries it `after` so long, which takes `again`. None: nobody does.
    """

    task: str
    slot: datetime
    raises: str
    seconds: float
    says: str | None = None
    by: str | None = None
    after: timedelta = timedelta(minutes=40)
    again: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)
    run: str = ""

    @property
    def started(self) -> datetime:
        return self.slot + SHORTLY

    @property
    def ended(self) -> datetime:
        return self.started + timedelta(seconds=self.seconds)


def plan(stage: Stage, told: Told) -> None:
    """Let a run fail, and be retried if somebody does that; otherwise the next success of its task
    is looked at.
    """
    stage.add(told.ended, partial(_fail, stage, told))
    if told.by is not None:
        stage.add(told.ended + told.after, partial(_retry, stage, told, told.by))
        return
    later = [m for m in stage.made if m.run["task"] == told.task and m.ended > told.ended]
    if later:
        success = min(later, key=lambda made: made.ended)
        stage.told_of.add(success.run["id"])
        stage.add(success.ended + SECOND, nothing)


async def nothing() -> None:
    """Only the watch looks at the ledger."""


async def _fail(stage: Stage, told: Told) -> None:
    node = stage.node_at(told.started)
    claimed = await stage.begin(
        stage.new(told.task, told.slot, told.slot + SHORTLY / 4), node, told.started
    )
    told.run = claimed.id
    lines = [info(told.task, told.started + SECOND / 5, "begins")]
    if told.says is not None:
        lines.append(info(told.task, clock.now() - SECOND / 50, told.says, "error"))
    await stage.end(claimed, node, failure_of(told.task, told.raises), lines=lines, **told.more)


async def _retry(stage: Stage, told: Told, by: str) -> None:
    await stage.by(by)(RetryRun(run=told.run))
    again(stage, told.run, clock.now() + SECOND, told.again or PARTS[told.task].usual)


def again(stage: Stage, run: str, begin: datetime, seconds: float) -> None:
    """Let a run that waits be claimed, and succeed."""
    stage.add(begin, partial(_claim, stage, run, seconds), looks=False)


async def _claim(stage: Stage, run: str, seconds: float) -> None:
    node = stage.node_at(clock.now(), "node-b")
    claimed = await stage.claim(run, node)
    stage.add(clock.now() + timedelta(seconds=seconds), partial(succeed, stage, claimed, node))


async def succeed(stage: Stage, claimed: Claimed, node: str) -> None:
    """A run that goes on ends with success now."""
    part = PARTS[claimed.task]
    line = info(claimed.task, clock.now(), f"{part.says} rows={part.items}")
    await stage.end(claimed, node, result={"rows": part.items}, lines=[line])


async def retry_both(stage: Stage, told: Sequence[Told], by: str) -> None:
    """A person retries all failed runs of a task at once. They run one after the other."""
    operations = stage.by(by)
    since, until = told[0].slot, told[-1].slot + SECOND
    wanted = RunFilter.of(task=told[0].task, state=["failed"], slot_since=since, slot_until=until)
    preview = await operations(PreviewBulk(action="retry", filter=wanted))
    await operations(BeginBulk(preview=preview.id))
    await carry_out(operations.context, preview.id)
    begin = clock.now() + SECOND
    for each in told:
        again(stage, each.run, begin, each.again)
        begin += timedelta(seconds=each.again) + SECOND


@dataclass(frozen=True)
class ByHand:
    """A run that a person starts. `cancelled`: why it is cancelled in the end; None: it
    succeeds.
    """

    task: str
    at: datetime
    by: str
    seconds: float
    cancelled: str | None = None


def plan_by_hand(stage: Stage, run: ByHand) -> None:
    """Let a person start a run."""
    stage.add(run.at, partial(_start, stage, run), looks=False)


async def _start(stage: Stage, run: ByHand) -> None:
    started = await stage.by(run.by)(StartRun(name=run.task, parameters={}))
    if run.cancelled is None:
        again(stage, started.id, clock.now() + SECOND, run.seconds)
        return
    node = stage.node_at(clock.now())
    claimed = await stage.claim(started.id, node)
    stage.add(
        clock.now() + timedelta(seconds=run.seconds), partial(_cancel, stage, run, claimed, node)
    )


async def _cancel(stage: Stage, run: ByHand, claimed: Claimed, node: str) -> None:
    await stage.by(run.by)(CancelRun(run=claimed.id, note=run.cancelled))
    reason = f"cancelled by {run.by}: {run.cancelled}"
    clock.advance(SECOND)
    lines: list[LogLine] = [info(run.task, claimed.attempt_started_at + SECOND, "begins")]
    await stage.end(claimed, node, state=RunState.CANCELLED, reason=reason, lines=lines)
