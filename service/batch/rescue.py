"""Rescue: the runs of a node that died on this machine are interrupted, so that any node resumes them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch import presence, runs
from service.batch.runs import Outcome
from service.batch.states import Rank, RunState
from service.batch.tables import attempts, nodes
from service.batch.tables import runs as runs_table
from service.logs import get_logger

logger = get_logger("service.batch")

MOST_LOSSES = 3
"""A run that took its node down so often is not started again."""


async def rescue(connection: AsyncConnection, folder: Path, now: datetime) -> list[str]:
    """Find the dead nodes of this machine and interrupt what they were running. Reads files: call it off the loop.

    Returns their ids; once this is committed their files may go. No attempt is used up. A run that is lost for the
    third time fails instead: it may be what kills its nodes.
    """
    left = (await connection.execute(select(nodes.c.id).where(nodes.c.stopped_at.is_(None)))).scalars()
    dead = [node for node in left if presence.is_gone(folder, node)]
    if not dead:
        return []
    lost = await _running_on(connection, dead)
    losses = await _losses(connection, [run["id"] for run in lost])
    await runs.finish(connection, [_lost(run, losses[run["id"]], now) for run in lost])
    await connection.execute(update(nodes).where(nodes.c.id.in_(dead)).values(stopped_at=now))
    tasks = ", ".join(sorted({run["task"] for run in lost})) or "nothing"
    logger.warning(f"nodes of this machine that ended without a word: {len(dead)}; they were running: {tasks}")
    return dead


async def leave_nothing_running(connection: AsyncConnection, node: str, now: datetime) -> None:
    """Interrupt what a node that stops in order has claimed but not started, or given up without a word."""
    left = await _running_on(connection, [node])
    await runs.finish(connection, [_interrupted(run, now, "interrupted", "the service stopped") for run in left])


async def _running_on(connection: AsyncConnection, of: list[str]) -> list[dict[str, Any]]:
    running = select(runs_table).where(runs_table.c.node.in_(of), runs_table.c.state == RunState.RUNNING)
    return [dict(row) for row in (await connection.execute(running.with_for_update())).mappings()]


async def _losses(connection: AsyncConnection, ids: list[str]) -> Counter[str]:
    """How often each of these runs has lost its node before."""
    statement = (
        select(attempts.c.run, func.count().label("losses"))
        .where(attempts.c.run.in_(ids), attempts.c.outcome == "lost")
        .group_by(attempts.c.run)
    )
    return Counter({row.run: row.losses for row in await connection.execute(statement)})


def _lost(run: dict[str, Any], losses: int, now: datetime) -> Outcome:
    reason = "the node was lost while it ran"
    outcome = _interrupted(run, now, "lost", reason)
    if losses + 1 < MOST_LOSSES:
        return outcome
    poison = f"poison: {reason} {MOST_LOSSES} times"
    return replace(outcome, state=RunState.FAILED, reason=poison, due_at=None, rank=None)


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
