"""Rescue: the runs of a dead node are interrupted, so that any node resumes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import func, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch import runs
from service.batch.policies import not_run_again
from service.batch.runs import Outcome
from service.batch.states import Rank, RunState
from service.batch.tables import HELD_SQL, attempts, nodes, tasks
from service.batch.tables import runs as runs_table
from service.logs import get_logger

logger = get_logger("service.batch")

MOST_LOSSES = 3
"""A run that took its node down so often is not started again."""


async def rescue(connection: AsyncConnection, dead: Mapping[str, int], now: datetime) -> list[str]:
    """Mark these nodes as stopped and interrupt what they were running. `dead`: the counters they were seen with.

    Returns the ids of those that were still found so. One that has beaten since is left alone; so is, until the next
    time, what somebody holds a lock on. No attempt is used up. A run that is lost for the third time fails instead: it
    may be what kills its nodes.
    """
    found = select(nodes.c.id, nodes.c.beats).where(nodes.c.id.in_(dead)).order_by(nodes.c.id)
    locked = await connection.execute(found.with_for_update(skip_locked=True))
    gone = [node for node, beats in locked if beats == dead[node]]
    if not gone:
        return []
    lost = await _running_on(connection, gone)
    losses = await _losses(connection, [run["id"] for run in lost])
    final = await _not_run_again(connection, lost)
    await runs.finish(connection, [_lost(run, losses[run["id"]], run["task"] in final, now) for run in lost])
    mark = update(nodes).where(nodes.c.id.in_(gone), nodes.c.stopped_at.is_(None))
    await connection.execute(mark.values(stopped_at=now))
    names = ", ".join(sorted({run["task"] for run in lost})) or "nothing"
    logger.warning(f"nodes that ended without a word, or lost their lease: {len(gone)}; they were running: {names}")
    return gone


async def leave_nothing_running(connection: AsyncConnection, node: str, now: datetime, reason: str) -> None:
    """Interrupt what a node that stops in order has claimed but not started, or given up without a word."""
    left = await _running_on(connection, [node])
    final = await _not_run_again(connection, left)
    await runs.finish(connection, [_left(run, run["task"] in final, now, reason) for run in left])


async def _running_on(connection: AsyncConnection, of: list[str]) -> list[dict[str, Any]]:
    running = select(runs_table).where(runs_table.c.node.in_(of), text(HELD_SQL))
    found = await connection.execute(running.order_by(runs_table.c.id).with_for_update(skip_locked=True))
    return [dict(row) for row in found.mappings()]


async def _not_run_again(connection: AsyncConnection, lost: list[dict[str, Any]]) -> set[str]:
    """The tasks among those of these runs with `rerun = False`. This node may not have loaded them."""
    statement = select(tasks.c.name, tasks.c.policies).where(tasks.c.name.in_({run["task"] for run in lost}))
    return {name for name, policies in await connection.execute(statement) if not policies.get("rerun", True)}


async def _losses(connection: AsyncConnection, ids: list[str]) -> Counter[str]:
    """How often each of these runs has lost its node before."""
    statement = (
        select(attempts.c.run, func.count().label("losses"))
        .where(attempts.c.run.in_(ids), attempts.c.outcome == "lost")
        .group_by(attempts.c.run)
    )
    return Counter({row.run: row.losses for row in await connection.execute(statement)})


def _lost(run: dict[str, Any], losses: int, is_final: bool, now: datetime) -> Outcome:
    reason = "the node was lost while it ran"
    outcome = _interrupted(run, now, "lost", reason)
    if is_final:
        return _failed(outcome, reason)
    return outcome if losses + 1 < MOST_LOSSES else _failed(outcome, f"poison: {reason} {MOST_LOSSES} times")


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
