"""Runs that cost their node the lease or the process wait before they go on, and fail in the end.

It is never certain which run was the cause. So each lost attempt without progress counts, unless
something else was the cause: then the run goes on at once, however often that happens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import runs

LOST = "lost"
"""The fingerprint of a run that has failed because it lost its node."""

POISON = "poison: "
"""The beginning of the reason of a run that has failed because it lost its node too often."""

MOST_LOSSES = 5
"""A run that has lost its node this often without progress in between fails: it may be the run that
kills nodes.
"""

SHORTEST_WAIT, LONGEST_WAIT = timedelta(seconds=30), timedelta(minutes=10)
"""The first wait of such a run, and the longest."""

SUSPECT_SECONDS = 300.0
"""An attempt that had been running for longer when the ledger stopped answering is not considered
the cause.
"""


@dataclass(frozen=True)
class LostLease:
    """A lease that was lost although the ledger was there: the ledger was locked or did not answer,
    or this node stood still.

    `since`: the boot time at which that began. `cause`: in words for people. `is_proven`: whether
    this process was certainly the cause.
    """

    cause: str
    since: float
    is_proven: bool = False

    def is_by(self, started_at: float) -> bool:
        """Whether an attempt that began at this boot time may be the cause."""
        return self.since - started_at < SUSPECT_SECONDS


def wait_before(losses: int, is_proven: bool = False) -> timedelta:
    """How long a run waits after this many losses of its node without progress. The first loss may
    be chance.
    """
    doubled = losses - (1 if is_proven else 2)
    return min(LONGEST_WAIT, SHORTEST_WAIT * 2**doubled) if doubled >= 0 else timedelta(0)


Row = Mapping[str, Any]


async def charge(
    connection: AsyncConnection, rows: Mapping[str, Row], outcomes: Sequence[Outcome]
) -> list[Outcome]:
    """Count a loss for each of the runs of these interrupted outcomes, and make them wait or fail.

    `rows`: the rows of the runs by id, before the outcomes are written. The caller has locked them.
    """
    losses = {outcome.id: _losses(rows[outcome.id]) for outcome in outcomes}
    charged = [_charged(outcome, losses[outcome.id]) for outcome in outcomes]
    await _record(
        connection, rows, losses, {each.id for each in charged if each.state == RunState.RETRYING}
    )
    return charged


async def charge_suspects(
    connection: AsyncConnection, outcomes: Sequence[Outcome]
) -> list[Outcome]:
    """The outcomes of a node, with a loss counted for each attempt that may have cost the node its
    lease (see Outcome.harm).
    """
    suspects = [outcome for outcome in outcomes if outcome.harm is not None]
    if not suspects:
        return list(outcomes)
    theirs = json_rows.is_among(
        runs.c.id, [outcome.id for outcome in suspects], connection.dialect.name
    )
    query = (
        select(runs)
        .where(theirs, runs.c.state == RunState.RUNNING)
        .order_by(runs.c.id)
        .with_for_update()
    )
    rows = {row["id"]: dict(row) for row in (await connection.execute(query)).mappings()}
    held = [
        outcome
        for outcome in suspects
        if outcome.id in rows and rows[outcome.id]["fence"] == outcome.fence
    ]
    for outcome in held:
        if outcome.count is not None:  # the row may not have it yet
            own = ("count", "count_before", "progress_at")
            rows[outcome.id] |= {name: getattr(outcome, name) for name in own}
    charged = {outcome.id: outcome for outcome in await charge(connection, rows, held)}
    return [charged.get(outcome.id, outcome) for outcome in outcomes]


def _charged(outcome: Outcome, losses: int) -> Outcome:
    cause = outcome.harm or outcome.reason or ""
    if losses >= MOST_LOSSES:
        reason = (
            f"{POISON}{cause}, {losses} times without progress; do not retry it before that is "
            "mended"
        )
        return failed(outcome, reason)
    wait = wait_before(losses, outcome.harm_is_proven)
    if not wait:
        return outcome
    often = f", {losses} times without progress" if losses > 1 else ""
    reason = f"{cause}{often}: it goes on after {wait.total_seconds():.0f} s"
    due_at = (outcome.due_at or outcome.ended_at) + wait
    waits = replace(outcome, state=RunState.RETRYING, reason=reason, due_at=due_at, rank=None)
    return replace(waits, fingerprint=LOST)  # so that people are notified


def failed(outcome: Outcome, reason: str) -> Outcome:
    """The outcome of a run that does not go on because it has lost its node."""
    return replace(
        outcome, state=RunState.FAILED, reason=reason, due_at=None, rank=None, fingerprint=LOST
    )


def _losses(run: Row) -> int:
    """How often the run has lost its node since it last made progress, including this time."""
    return 1 if _made_progress(run) else run["losses"] + 1


def _made_progress(run: Row) -> bool:
    """Whether the lost attempt did work that the next one need not repeat.

    Loops over chunks go on where earlier attempts ended, so every item counted since then is done
    for good. A task that does its own counting may start again from zero, so it has made progress
    if it got further than all lost attempts.
    """
    count, before = run["count"], run["count_before"]
    if (
        count is None
        or run["progress_at"] is None
        or run["progress_at"] < run["attempt_started_at"]
    ):
        return (
            False  # this attempt has reported nothing; the row has the progress of an earlier one
        )
    return bool(count > before if before else count > (run["count_lost"] or 0))


async def _record(
    connection: AsyncConnection,
    runs_by_id: Mapping[str, Row],
    losses: Mapping[str, int],
    waiting: Collection[str],
) -> None:
    """Write to their rows how often the runs were lost.

    A run that waits goes on with another attempt. That attempt does not count against the policy,
    which counts from `attempts_before` on.
    """
    kind = connection.dialect.name
    columns = [runs.c[name] for name in ("id", "losses", "count_lost", "attempts_before")]
    rows = [
        {
            "id": run,
            "losses": number,
            "count_lost": max(runs_by_id[run]["count"] or 0, runs_by_id[run]["count_lost"] or 0),
            "attempts_before": runs_by_id[run]["attempts_before"] + (run in waiting),
        }
        for run, number in losses.items()
    ]
    if not rows:
        return
    statement = text(
        "UPDATE batch_runs SET losses = v.losses, count_lost = v.count_lost, attempts_before = "
        "v.attempts_before "
        f"FROM {json_rows.source(columns, kind)} WHERE batch_runs.id = v.id"
    )
    await connection.execute(statement, {"rows": json_rows.encode(rows, kind)})
