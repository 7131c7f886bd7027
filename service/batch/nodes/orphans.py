"""Rescue: the runs of a dead node are interrupted, so that any node resumes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import json_rows, transitions
from service.batch.ledger.attempts import Outcome
from service.batch.ledger.states import Rank, RunState
from service.batch.ledger.tables import HELD_SQL, nodes, runs, tasks
from service.batch.tasks.policies import not_run_again
from service.logs import get_logger

logger = get_logger("service.batch")

MOST_LOSSES = 3
"""A run that took its node down so often, without having got on in between, is not started again."""


async def rescue(connection: AsyncConnection, dead: Mapping[str, int], now: datetime) -> list[str]:
    """Mark these nodes as stopped and interrupt what they were running. `dead`: the counters they were seen with.

    Returns the ids of those that were still found so. One that has beaten since is left alone; so is, until the next
    time, what somebody holds a lock on. No attempt is used up. A run that is lost for the third time since it got on
    fails instead: it may be what kills its nodes.
    """
    found = select(nodes.c.id, nodes.c.beats).where(nodes.c.id.in_(dead)).order_by(nodes.c.id)
    locked = await connection.execute(found.with_for_update(skip_locked=True))
    gone = [node for node, beats in locked if beats == dead[node]]
    if not gone:
        return []
    lost = await _running_on(connection, gone)
    losses = {run["id"]: _losses(run) for run in lost}
    final = await _not_run_again(connection, lost)
    await transitions.finish(connection, [_lost(run, losses[run["id"]], run["task"] in final, now) for run in lost])
    await _record_losses(connection, lost, losses)
    mark = update(nodes).where(nodes.c.id.in_(gone), nodes.c.stopped_at.is_(None))
    await connection.execute(mark.values(stopped_at=now))
    names = ", ".join(sorted({run["task"] for run in lost})) or "nothing"
    logger.warning(f"nodes that ended without a word, or lost their lease: {len(gone)}; they were running: {names}")
    return gone


async def leave_nothing_running(connection: AsyncConnection, node: str, now: datetime, reason: str) -> None:
    """Interrupt what a node that stops in order has claimed but not started, or given up without a word."""
    left = await _running_on(connection, [node])
    final = await _not_run_again(connection, left)
    await transitions.finish(connection, [_left(run, run["task"] in final, now, reason) for run in left])


async def _running_on(connection: AsyncConnection, of: list[str]) -> list[dict[str, Any]]:
    running = select(runs).where(runs.c.node.in_(of), text(HELD_SQL))
    found = await connection.execute(running.order_by(runs.c.id).with_for_update(skip_locked=True))
    return [dict(row) for row in found.mappings()]


async def _not_run_again(connection: AsyncConnection, lost: list[dict[str, Any]]) -> set[str]:
    """The tasks among those of these runs with `rerun = False`. This node may not have loaded them."""
    statement = select(tasks.c.name, tasks.c.policies).where(tasks.c.name.in_({run["task"] for run in lost}))
    return {name for name, policies in await connection.execute(statement) if not policies.get("rerun", True)}


def _losses(run: dict[str, Any]) -> int:
    """How often it has lost its node since it got on, this time included."""
    return 1 if _got_on(run) else run["losses"] + 1


def _got_on(run: dict[str, Any]) -> bool:
    """Whether the attempt that was lost did something that the next one need not do again.

    Loops over chunks go on where earlier attempts ended, so what they have counted beyond that is there to stay. A task
    that counts by itself may have begun at zero: it got on if it came further than any attempt that was lost before.
    """
    count, before = run["count"], run["count_before"]
    if count is None or run["progress_at"] is None or run["progress_at"] < run["attempt_started_at"]:
        return False  # it has said nothing; what stands there is an earlier attempt's
    return bool(count > before if before else count > (run["count_lost"] or 0))


async def _record_losses(connection: AsyncConnection, lost: list[dict[str, Any]], losses: Mapping[str, int]) -> None:
    """On the rows of runs that this transaction has locked."""
    kind, columns = connection.dialect.name, [runs.c[name] for name in ("id", "losses", "count_lost")]
    new = [
        {"id": run["id"], "losses": losses[run["id"]], "count_lost": max(run["count"] or 0, run["count_lost"] or 0)}
        for run in lost
    ]
    statement = text(
        f"UPDATE batch_runs SET losses = v.losses, count_lost = v.count_lost FROM {json_rows.source(columns, kind)} "
        "WHERE batch_runs.id = v.id"
    )
    await connection.execute(statement, {"rows": json_rows.encode(new, kind)})


def _lost(run: dict[str, Any], losses: int, is_final: bool, now: datetime) -> Outcome:
    reason = "the node was lost while it ran"
    outcome = _interrupted(run, now, "lost", reason)
    if is_final:
        return _failed(outcome, reason)
    if losses < MOST_LOSSES:
        return outcome
    return _failed(outcome, f"poison: {reason}, {MOST_LOSSES} times without progress")


def _left(run: dict[str, Any], is_final: bool, now: datetime, reason: str) -> Outcome:
    outcome = _interrupted(run, now, "interrupted", reason)
    return _failed(outcome, not_run_again(reason)) if is_final else outcome


def _failed(outcome: Outcome, reason: str) -> Outcome:
    return replace(outcome, state=RunState.FAILED, reason=reason, due_at=None, rank=None)


def _interrupted(run: dict[str, Any], now: datetime, outcome: str, reason: str) -> Outcome:
    return Outcome(
        id=run["id"],
        fence=run["fence"],
        state=RunState.INTERRUPTED,
        outcome=outcome,
        number=run["attempt"],
        node=run["node"],
        task=run["task"],
        started_at=run["attempt_started_at"],
        ended_at=now,
        reason=reason,
        due_at=now,
        rank=Rank.INTERRUPTED,
    )
