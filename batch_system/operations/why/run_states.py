"""Why a run that has not failed is in its state: what it waits for, or why it was skipped or
cancelled.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import attempts as attempt_rows
from batch_system.batch.ledger import chains
from batch_system.batch.ledger.states import RunState
from batch_system.operations.runs import blocking, late
from batch_system.operations.runs.awaited import blocker_of
from batch_system.operations.system.nodes import living_services
from batch_system.operations.why import standing
from batch_system.operations.why.asked import Asked, first_line_of
from batch_system.operations.why.results import Reason
from batch_system.words import utc


async def of_run(asked: Asked, row: dict[str, Any]) -> list[Reason]:
    """Why a run with which nothing was wrong is in its state."""
    connection, state = asked.connection, row["state"]
    if state == RunState.CANCELLED:
        return [_cancelled(row)]
    if state == RunState.SKIPPED:
        return await skipped(connection, row)
    if state == RunState.RETRYING:
        ended = await attempt_rows.of_run(connection, row["id"])
        error = (ended[-1]["error"] or {}) if ended else {}
        text = first_line_of(
            f"{error.get('type', 'its attempt')}: {error.get('message', 'failed')}"
        )
        again = f"attempt {row['attempt']:,} failed; the next one begins {utc(row['due_at'])}"
        return [Reason(kind="retries", text=f"{again}: {text}", at=row["due_at"])]
    if state == RunState.RUNNING:
        since = row["attempt_started_at"] or row["created_at"]
        seconds = (asked.now - since).total_seconds()
        return [Reason(kind="running", text=f"it has run for {seconds:,.0f} s", at=since)]
    if state == RunState.SUCCEEDED:
        return await _succeeded(connection, row)
    return await _waits(asked, row)


async def _succeeded(connection: AsyncConnection, row: dict[str, Any]) -> list[Reason]:
    failed = [each for each in await attempt_rows.of_run(connection, row["id"]) if each["error"]]
    if not failed:
        return [Reason(kind="good", text="nothing was wrong with it", at=row["finished_at"])]
    last = failed[-1]
    error = first_line_of(f"{last['error']['type']}: {last['error']['message']}")
    text = f"its attempt {last['number']:,} failed: {error}; a later one has succeeded"
    return [Reason(kind="made_good", text=text, at=row["finished_at"])]


async def _waits(asked: Asked, row: dict[str, Any]) -> list[Reason]:
    """What holds a run that waits."""
    living = await living_services(asked.connection, asked.context, asked.now)
    found = await late.waiting_of(asked.connection, row["id"], living, asked.now)
    reasons: list[Reason] = []
    if found is not None and (blocker := found.blocker) is not None:
        if blocker.kind == "paused":
            reasons += await standing.pause_of(asked, row["task"])
        elif blocker.kind in ("unserved", "pool"):
            reasons += await standing.unserved(asked, row["task"])
        if not reasons:
            text = f"it waits: {blocking.blocker_in_words(blocker).removeprefix('for ')}"
            reasons.append(Reason(kind="waits", text=text, run=blocker.run, task=blocker.task))
    if found is not None:
        reasons += [
            Reason(kind="waits", text=f"it waits {blocking.sentence(each)}", run=each.run)
            for each in found.awaits
        ]
    return reasons or [Reason(kind="waits", text="nothing is known to hold it")]


async def skipped(connection: AsyncConnection, row: dict[str, Any]) -> list[Reason]:
    """Why a run was skipped: its reason, and what was in the way at the beginning of its chain."""
    reason = first_line_of(row["reason"])
    found = await chains.in_the_way(connection, [row["id"]])
    blocker = blocker_of(found, row["id"])
    first = blocker.cause if blocker is not None and blocker.cause is not None else blocker
    if first is None:
        return [Reason(kind="skipped", text=reason or "the ledger has no reason for it")]
    state = first.reason or f"{first.task} {first.state or 'was not fired'}"
    its: dict[str, Any] = {"run": first.run, "task": first.task}
    if reason is None or reason == state:
        return [Reason(kind="skipped", text=state, **its)]
    text = f"at the beginning of its chain: {state}"
    return [Reason(kind="skipped", text=reason), Reason(kind="skipped", text=text, **its)]


def _cancelled(row: dict[str, Any]) -> Reason:
    by = f"{row['cancel_by']} cancelled it" if row["cancel_by"] else "it was cancelled"
    why = row["cancel_reason"] or row["reason"]
    text = f"{by}: {first_line_of(why)}" if why else by
    return Reason(kind="cancelled", text=text, at=row["cancel_at"] or row["finished_at"])
