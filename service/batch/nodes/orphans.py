"""Rescue of orphans: the runs of a dead node are interrupted, so that any node resumes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import json_rows, transitions
from service.batch.ledger.attempts import Outcome
from service.batch.ledger.people import node_events
from service.batch.ledger.states import Rank, RunState
from service.batch.ledger.tables import HELD_SQL, nodes, runs, tasks
from service.batch.tasks.policies import not_run_again
from service.logs import get_logger

logger = get_logger("service.batch")

LOST = "lost"
"""The fingerprint of a run that has failed because it lost its node."""

MOST_LOSSES = 3
"""How often a run may lose its node without progress in between. Then it fails: it may be the run that kills nodes."""


async def rescue(connection: AsyncConnection, dead: Mapping[str, int], now: datetime) -> list[str]:
    """Mark dead nodes as stopped, and interrupt the runs that they hold. Returns the ids of the nodes it has marked.

    `dead`: the beats of each node when it was found dead, by its id. A node that has beaten since is left as it is.
    Rows that another transaction has locked are left for the next time. A rescue uses up no attempt. A run that is lost
    for the third time without progress fails instead.
    """
    columns = [nodes.c[name] for name in ("id", "beats", "host", "pid", "seen_at", "stopped_at")]
    suspects = select(*columns).where(nodes.c.id.in_(dead)).order_by(nodes.c.id)
    locked = await connection.execute(suspects.with_for_update(skip_locked=True))
    found = [row for row in locked.mappings() if row["beats"] == dead[row["id"]]]
    lost_nodes = [row["id"] for row in found]
    if not lost_nodes:
        return []
    lost = await _runs_of(connection, lost_nodes)
    losses = {run["id"]: _losses(run) for run in lost}
    final = await _not_run_again(connection, lost)
    outcomes = [_outcome_of_lost(run, losses[run["id"]], run["task"] in final, now) for run in lost]
    await transitions.finish(connection, outcomes)
    await _record_losses(connection, lost, losses)
    marked = [row for row in found if row["stopped_at"] is None]
    if not marked and not lost:  # another transaction has locked what they hold: the next poll finds it again
        return []
    mark = update(nodes).where(nodes.c.id.in_(row["id"] for row in marked))
    await connection.execute(mark.values(stopped_at=now, lost_at=now, noticed_at=None))
    tasks_by_node: dict[str, set[str]] = {}
    for run in lost:
        tasks_by_node.setdefault(run["node"], set()).add(run["task"])
    await node_events.record_lost(connection, marked, tasks_by_node, now)
    for row in found:
        names = ", ".join(sorted(tasks_by_node.get(row["id"], ()))) or "none"
        what = f"the node {row['id']} (host {row['host']}, pid {row['pid']})"
        logger.warning(f"{what} has died or lost its lease; its runs are interrupted, of the tasks: {names}")
    return lost_nodes


async def interrupt_runs_of(connection: AsyncConnection, node: str, now: datetime, reason: str) -> None:
    """Interrupt the runs that a node still holds: claimed and not started, or given up and not reported."""
    held = await _runs_of(connection, [node])
    final = await _not_run_again(connection, held)
    await transitions.finish(connection, [_outcome_of_left(run, run["task"] in final, now, reason) for run in held])


async def _runs_of(connection: AsyncConnection, node_ids: list[str]) -> list[dict[str, Any]]:
    """The rows of the runs that these nodes hold, locked, but for those that another transaction has locked."""
    held = select(runs).where(runs.c.node.in_(node_ids), text(HELD_SQL))
    rows = await connection.execute(held.order_by(runs.c.id).with_for_update(skip_locked=True))
    return [dict(row) for row in rows.mappings()]


async def _not_run_again(connection: AsyncConnection, held: list[dict[str, Any]]) -> set[str]:
    """The tasks of these runs that declare `rerun = False`, by the ledger: this node may not have loaded them."""
    statement = select(tasks.c.name, tasks.c.policies).where(tasks.c.name.in_({run["task"] for run in held}))
    return {name for name, policies in await connection.execute(statement) if not policies.get("rerun", True)}


def _losses(run: dict[str, Any]) -> int:
    """How often the run has lost its node since it last made progress, this time included."""
    return 1 if _made_progress(run) else run["losses"] + 1


def _made_progress(run: dict[str, Any]) -> bool:
    """Whether the lost attempt did work that the next one need not repeat.

    Loops over chunks go on where earlier attempts ended, so each item they have counted since then is done for good. A
    task that counts by itself may begin at zero again: it made progress if it came further than all lost attempts.
    """
    count, before = run["count"], run["count_before"]
    if count is None or run["progress_at"] is None or run["progress_at"] < run["attempt_started_at"]:
        return False  # this attempt has reported nothing; the row has the progress of an earlier one
    return bool(count > before if before else count > (run["count_lost"] or 0))


async def _record_losses(connection: AsyncConnection, lost: list[dict[str, Any]], losses: Mapping[str, int]) -> None:
    """Write how often the runs were lost to their rows, which this transaction has locked."""
    kind, columns = connection.dialect.name, [runs.c[name] for name in ("id", "losses", "count_lost")]
    rows = [
        {"id": run["id"], "losses": losses[run["id"]], "count_lost": max(run["count"] or 0, run["count_lost"] or 0)}
        for run in lost
    ]
    statement = text(
        f"UPDATE batch_runs SET losses = v.losses, count_lost = v.count_lost FROM {json_rows.source(columns, kind)} "
        "WHERE batch_runs.id = v.id"
    )
    await connection.execute(statement, {"rows": json_rows.encode(rows, kind)})


def _outcome_of_lost(run: dict[str, Any], losses: int, is_final: bool, now: datetime) -> Outcome:
    reason = "the node was lost while it ran"
    outcome = _interrupted(run, now, "lost", reason)
    if is_final:
        return _failed(outcome, reason)
    if losses < MOST_LOSSES:
        return outcome
    return _failed(outcome, f"poison: {reason}, {MOST_LOSSES} times without progress")


def _outcome_of_left(run: dict[str, Any], is_final: bool, now: datetime, reason: str) -> Outcome:
    outcome = _interrupted(run, now, "interrupted", reason)
    return _failed(outcome, not_run_again(reason)) if is_final else outcome


def _failed(outcome: Outcome, reason: str) -> Outcome:
    return replace(outcome, state=RunState.FAILED, reason=reason, due_at=None, rank=None, fingerprint=LOST)


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
