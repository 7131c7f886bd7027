"""What runs in the state `waiting` wait for: an instant, slots of other tasks, the members of a
group, or parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Literal

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import chains, json_rows, parts, waits
from service.batch.ledger.parts import PartsGate, Tally
from service.batch.ledger.states import RunState
from service.batch.ledger.tables import runs
from service.batch.ledger.waits import Members, Upstream
from service.operations.runs.waiting import Awaited, InTheWay


async def awaited(
    connection: AsyncConnection, ids: Sequence[str], now: datetime
) -> dict[str, list[Awaited]]:
    """By the id of each of these runs that waits: its instant, its group or parts, and the slots
    that are not over.

    A slot that is over without success is among them if the run needs its success: only a retry can
    open the run.
    """
    if not ids:
        return {}
    theirs = json_rows.is_among(runs.c.id, ids, connection.dialect.name)
    query = select(runs.c.id, runs.c.due_at, runs.c.gate, runs.c.state).where(theirs)
    waiting = [row for row in await connection.execute(query) if row.state == RunState.WAITING]
    gated = {row.id: row.gate for row in waiting if row.gate is not None}
    groups = await waits.members(connection, list(gated)) if gated else {}
    split = [run for run, gate in gated.items() if gate in tuple(PartsGate)]
    tallies = await parts.tallies(connection, split) if split else {}
    slots = await waits.upstreams(connection, gated) if gated else {}
    left = {
        run: [each for each in slots.get(run, []) if _is_left(each, gate)]
        for run, gate in gated.items()
    }
    asked = [
        each.run
        for its in left.values()
        for each in its
        if each.run and each.state in chains.MAY_HAVE_CAUSE
    ]
    found = await chains.in_the_way(connection, asked) if asked else {}
    return {
        row.id: [
            *([Awaited(kind="instant", at=row.due_at)] if row.due_at > now else []),
            *_of_members("group", groups.get(row.id)),
            *_of_members("parts", tallies.get(row.id)),
            *(_of_slot(each, found) for each in left.get(row.id, [])),
        ]
        for row in waiting
    }


def _is_left(upstream: Upstream, gate: str) -> bool:
    needs_success = gate == waits.Gate.SUCCESS
    return upstream.is_pending or (needs_success and upstream.state != RunState.SUCCEEDED)


def _of_members(kind: Literal["group", "parts"], members: Members | Tally | None) -> list[Awaited]:
    return (
        [Awaited(kind=kind, active=members.active, members=members.number)]
        if members and members.active
        else []
    )


def _of_slot(each: Upstream, found: Mapping[str, Upstream]) -> Awaited:
    cause = chains.root(found, each.run) if each.run is not None else None
    return Awaited(
        kind="slot",
        at=each.slot,
        task=each.task,
        run=each.run,
        state=each.state,
        cause=shown_cause(cause),
    )


def shown_cause(upstream: Upstream | None) -> InTheWay | None:
    """A slot that is in the way, as people and programs read it."""
    if upstream is None:
        return None
    reason = upstream.why_none if not upstream.is_pending else None
    return InTheWay(
        task=upstream.task,
        slot=upstream.slot,
        run=upstream.run,
        state=upstream.state,
        reason=reason,
    )
