"""Rescue of orphans: the runs of a dead node are interrupted, so that any node resumes them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import transitions
from service.batch.ledger.attempts import Outcome
from service.batch.ledger.states import Rank, RunState
from service.batch.ledger.tables import HELD_SQL, nodes, runs, tasks
from service.batch.nodes import harm
from service.batch.tasks.policies import not_run_again
from service.logs import get_logger

logger = get_logger("service.batch")

NODE_LOST = "the node was lost while it ran"


async def accuse(connection: AsyncConnection, node: str, run: str, what: str) -> None:
    """Note what a running run does to its node, in its row. The node is about to end, and others rescue its runs."""
    held = (runs.c.id == run, runs.c.node == node, text(HELD_SQL))
    await connection.execute(update(runs).where(*held).values(reason=what))


async def rescue(connection: AsyncConnection, dead: Mapping[str, int], now: datetime) -> list[str]:
    """Mark dead nodes as stopped, and interrupt the runs that they hold. Returns the ids of the nodes it has marked.

    `dead`: the beats of each node when it was found dead, by its id. A node that has beaten since is left as it is.
    Rows that another transaction has locked are left for the next time. A rescue uses up no attempt. Each lost run pays
    for it (see `harm.charge`), but if it is known which one has blocked the event loop, only that one of its node.
    """
    suspects = select(nodes.c.id, nodes.c.beats).where(nodes.c.id.in_(dead)).order_by(nodes.c.id)
    locked = await connection.execute(suspects.with_for_update(skip_locked=True))
    lost_nodes = [node for node, beats in locked if beats == dead[node]]
    if not lost_nodes:
        return []
    lost = await _runs_of(connection, lost_nodes)
    final = await _not_run_again(connection, lost)
    accused = {run["node"] for run in lost if run["reason"]}
    outcomes = {run["id"]: _interrupted(run, now, "lost", run["reason"] or NODE_LOST) for run in lost}
    pay = [r["id"] for r in lost if r["task"] not in final and (r["reason"] or r["node"] not in accused)]
    charged = await harm.charge(connection, {run["id"]: run for run in lost}, [outcomes[run] for run in pay])
    outcomes |= {outcome.id: outcome for outcome in charged}
    outcomes |= {run["id"]: harm.failed(outcomes[run["id"]], NODE_LOST) for run in lost if run["task"] in final}
    await transitions.finish(connection, list(outcomes.values()))
    mark = update(nodes).where(nodes.c.id.in_(lost_nodes), nodes.c.stopped_at.is_(None))
    await connection.execute(mark.values(stopped_at=now, lost_at=now, noticed_at=None))
    names = ", ".join(sorted({run["task"] for run in lost})) or "nothing"
    logger.warning(f"{len(lost_nodes)} nodes have died or lost their lease; the tasks of their runs: {names}")
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


def _outcome_of_left(run: dict[str, Any], is_final: bool, now: datetime, reason: str) -> Outcome:
    outcome = _interrupted(run, now, "interrupted", reason)
    return harm.failed(outcome, not_run_again(reason)) if is_final else outcome


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
