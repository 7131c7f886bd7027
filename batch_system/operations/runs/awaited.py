"""What runs in the state `waiting` wait for: an instant, slots of other tasks, the members of a
group, or parts. Also finds the runs that wait for a slot which is late itself, or will not succeed
by itself.

A run that waits for a slot that is on its way is not late.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import chains, json_rows, parts, waits
from batch_system.batch.ledger.parts import PartsGate, Tally
from batch_system.batch.ledger.run_rows import run_rows
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import WAITING_SQL, runs
from batch_system.batch.ledger.waits import AwaitedSlot, Members
from batch_system.operations.runs.waiting import Awaited, Blocker, InTheWay, LateRun

MOST_WAITING = 200
"""At most this many waiting runs are read: those that have waited for the longest time."""
OF_A_TASK = 10
"""At most this many blocked runs of one task are shown."""
NOT_FIRED = timedelta(minutes=1)
"""A slot that has not been fired after this time is late."""

_WILL_NOT_SUCCEED = (RunState.FAILED, RunState.CANCELLED, RunState.SKIPPED)
_NAMES = ("id", "task", "slot", "state", "due_at", "created_at")


async def awaited(
    connection: AsyncConnection, ids: Sequence[str], now: datetime
) -> dict[str, list[Awaited]]:
    """For each of these runs that waits, by id: its instant, its group or parts, and the slots that
    are not over.

    A slot that is over without success is among them if the run needs its success: only a retry can
    open the run.
    """
    if not ids:
        return {}
    theirs = json_rows.is_among(runs.c.id, ids, connection.dialect.name)
    query = run_rows(("id", "due_at", "gate", "state"), theirs)
    waiting = [row for row in await connection.execute(query) if row.state == RunState.WAITING]
    gated = {row.id: row.gate for row in waiting if row.gate is not None}
    groups = await waits.members(connection, list(gated)) if gated else {}
    split = [run for run, gate in gated.items() if gate in tuple(PartsGate)]
    tallies = await parts.tallies(connection, split) if split else {}
    slots = await waits.slots(connection, gated) if gated else {}
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


def _is_left(slot: AwaitedSlot, gate: str) -> bool:
    needs_success = gate == waits.Gate.SUCCESS
    return slot.is_pending or (needs_success and slot.state != RunState.SUCCEEDED)


def _of_members(kind: Literal["group", "parts"], members: Members | Tally | None) -> list[Awaited]:
    return (
        [Awaited(kind=kind, active=members.active, members=members.number)]
        if members and members.active
        else []
    )


def _of_slot(each: AwaitedSlot, found: Mapping[str, AwaitedSlot]) -> Awaited:
    cause = chains.root(found, each.run) if each.run is not None else None
    return Awaited(
        kind="slot",
        at=each.slot,
        task=each.task,
        run=each.run,
        state=each.state,
        cause=shown_cause(cause),
    )


def shown_cause(slot: AwaitedSlot | None) -> InTheWay | None:
    """A slot that is in the way, as people and programs read it."""
    if slot is None:
        return None
    reason = slot.why_none if not slot.is_pending else None
    return InTheWay(
        task=slot.task,
        slot=slot.slot,
        run=slot.run,
        state=slot.state,
        reason=reason,
    )


async def blocked_runs(
    connection: AsyncConnection, late: Sequence[LateRun], now: datetime, shown_after: timedelta
) -> list[LateRun]:
    """The runs that wait in vain, or for one of the runs that are `late`, each with what is in its
    way.
    """
    rows = (await connection.execute(_waiting(now - shown_after))).all()
    found = await chains.in_the_way(connection, [row.id for row in rows]) if rows else {}
    late_ids = {run.run for run in late}
    shown: dict[str, int] = {}
    blocked = []
    for row in rows:
        cause = chains.root(found, row.id)
        if (
            cause is None
            or not _is_late(cause, late_ids, now)
            or shown.get(row.task, 0) >= OF_A_TASK
        ):
            continue
        shown[row.task] = shown.get(row.task, 0) + 1
        blocked.append(_blocked(row, blocker_of(found, row.id), now))
    return blocked


def blocker_of(found: Mapping[str, AwaitedSlot], run: str) -> Blocker | None:
    """What is in the way of a run. `found`: what `chains.in_the_way` has returned."""
    first, cause = found.get(run), chains.root(found, run)
    if first is None:
        return None
    reason = first.why_none if not first.is_pending else None
    return Blocker(
        kind="slot",
        task=first.task,
        run=first.run,
        state=first.state,
        reason=reason,
        cause=shown_cause(cause) if cause is not first else None,
    )


def _waiting(before: datetime) -> Any:
    """The runs of slots that have waited for other slots since before an instant, found by the
    index of waiting runs.
    """
    query = run_rows(_NAMES, WAITING_SQL, runs.c.due_at <= before, runs.c.gate.is_not(None))
    query = query.with_hint(runs, "INDEXED BY ix_batch_runs_waits", "sqlite")
    return (
        query.where(runs.c.slot.is_not(None)).order_by(runs.c.due_at, runs.c.id).limit(MOST_WAITING)
    )


def _is_late(cause: AwaitedSlot, late: Collection[str], now: datetime) -> bool:
    if cause.run is not None:
        return cause.run in late or cause.state in _WILL_NOT_SUCCEED
    return not cause.is_pending or (cause.slot is not None and cause.slot <= now - NOT_FIRED)


def _blocked(row: Row[Any], blocker: Blocker | None, now: datetime) -> LateRun:
    return LateRun(
        run=row.id,
        task=row.task,
        slot=row.slot,
        state=row.state,
        why="waits",
        elapsed=(now - row.due_at).total_seconds(),
        blocker=blocker,
    )
