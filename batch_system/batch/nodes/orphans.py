"""Rescue of orphans: the runs of a dead node are interrupted, so that any node resumes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import RowMapping, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import transitions
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.people import node_events
from batch_system.batch.ledger.states import Rank, RunState
from batch_system.batch.ledger.tables import HELD_SQL, nodes, runs, tasks
from batch_system.batch.nodes import harm
from batch_system.batch.tasks.declaration import not_run_again
from batch_system.database import sql
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

NODE_LOST = "the node was lost while it ran"


async def accuse(connection: AsyncConnection, node: str, run: str, what: str) -> None:
    """Write into a running run's row what it does to its node. The node is about to end, and others
    rescue its runs.
    """
    statement = sql.statement(
        f"UPDATE batch_runs SET reason = :what WHERE id = :run AND node = :node AND {HELD_SQL}",
        run=runs.c.id,
        node=runs.c.node,
        what=runs.c.reason,
    )
    await connection.execute(statement, {"run": run, "node": node, "what": what})


async def rescue(connection: AsyncConnection, dead: Mapping[str, int], now: datetime) -> list[str]:
    """Mark dead nodes as stopped, and interrupt the runs that they hold. Returns the ids of these
    nodes.

    `dead`: for each node's id, its beats when it was found dead. A node that has beaten since is
    left alone. Rows that another transaction has locked are left for the next time. A rescue uses
    up no attempt. A loss is counted for each lost run (see `harm.charge`); but if it is known which
    run of a node has blocked the event loop, only for that run.
    """
    columns = [nodes.c[name] for name in ("id", "beats", "host", "pid", "seen_at", "stopped_at")]
    suspects = select(*columns).where(nodes.c.id.in_(dead)).order_by(nodes.c.id)
    locked = await connection.execute(suspects.with_for_update(skip_locked=True))
    found = [row for row in locked.mappings() if row["beats"] == dead[row["id"]]]
    lost_nodes = [row["id"] for row in found]
    if not lost_nodes:
        return []
    lost = await _runs_of(connection, lost_nodes)
    final = await _not_run_again(connection, lost)
    accused = {run["node"] for run in lost if run["reason"]}
    outcomes = {run["id"]: _lost(run, now) for run in lost}
    pay = [
        r["id"]
        for r in lost
        if r["task"] not in final and (r["reason"] or r["node"] not in accused)
    ]
    charged = await harm.charge(
        connection, {run["id"]: run for run in lost}, [outcomes[run] for run in pay]
    )
    outcomes |= {outcome.id: outcome for outcome in charged}
    outcomes |= {
        run["id"]: harm.failed(outcomes[run["id"]], NODE_LOST)
        for run in lost
        if run["task"] in final
    }
    await transitions.finish(connection, list(outcomes.values()))
    marked = [row for row in found if row["stopped_at"] is None]
    if not marked and not lost:
        # Another transaction has locked the runs that they hold. The next poll finds them again.
        return []
    mark = update(nodes).where(nodes.c.id.in_(row["id"] for row in marked))
    await connection.execute(mark.values(stopped_at=now, lost_at=now, noticed_at=None))
    tasks_by_node: dict[str, set[str]] = {}
    for run in lost:
        tasks_by_node.setdefault(run["node"], set()).add(run["task"])
    await node_events.record_lost(connection, marked, tasks_by_node, now)
    _log_lost(found, tasks_by_node)
    return lost_nodes


def _log_lost(found: Iterable[RowMapping], tasks_by_node: Mapping[str, set[str]]) -> None:
    for row in found:
        names = ", ".join(sorted(tasks_by_node.get(row["id"], ()))) or "none"
        what = f"the node {row['id']} (host {row['host']}, pid {row['pid']})"
        logger.warning(
            f"{what} has died or lost its lease; its runs are interrupted, of the tasks: {names}"
        )


def _lost(run: dict[str, Any], now: datetime) -> Outcome:
    """The outcome of a lost run, with the reason that its node has recorded before its end (see
    `accuse`).
    """
    known = run["reason"]
    return replace(
        _interrupted(run, now, "lost", known or NODE_LOST),
        harm=known,
        harm_is_proven=known is not None,
    )


async def interrupt_runs_of(
    connection: AsyncConnection, node: str, now: datetime, reason: str
) -> None:
    """Interrupt the runs that a node still holds: claimed but not started, or given up but not
    reported.
    """
    held = await _runs_of(connection, [node])
    final = await _not_run_again(connection, held)
    await transitions.finish(
        connection, [_outcome_of_left(run, run["task"] in final, now, reason) for run in held]
    )


async def _runs_of(connection: AsyncConnection, node_ids: list[str]) -> list[dict[str, Any]]:
    """The rows of the runs that these nodes hold, locked, except those that another transaction has
    locked.
    """
    held = select(runs).where(runs.c.node.in_(node_ids), text(HELD_SQL))
    rows = await connection.execute(held.order_by(runs.c.id).with_for_update(skip_locked=True))
    return [dict(row) for row in rows.mappings()]


async def _not_run_again(connection: AsyncConnection, held: list[dict[str, Any]]) -> set[str]:
    """The tasks of these runs that declare `rerun = False`. Read from the ledger, because this node
    may not have loaded them.
    """
    statement = select(tasks.c.name, tasks.c.policies).where(
        tasks.c.name.in_({run["task"] for run in held})
    )
    return {
        name
        for name, policies in await connection.execute(statement)
        if not policies.get("rerun", True)
    }


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
