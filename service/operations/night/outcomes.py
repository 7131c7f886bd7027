"""What became of the failed slots of a window, and of the runs without a slot."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import alias, case, exists, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger.states import ACTIVE, RunState
from service.batch.ledger.tables import BY_HAND_SQL, NO_PART_SQL, OPEN_FAILURE_SQL, runs
from service.operations.night.models import Beside, FailedSlots, SlotCounts

MOST_COUNTED = 10_000


async def failed_slots(
    connection: AsyncConnection, slots: SlotCounts, since: datetime, end: datetime
) -> FailedSlots:
    """How many of the failed slots of the window are open, were acknowledged, or were made good
    since.
    """
    if not slots.failed:
        return FailedSlots(open=0, acknowledged=0, made_good_since=0, made_good_by_hand=0)
    by_hand = alias(runs)
    is_of_slot = (by_hand.c.slot == runs.c.slot, by_hand.c.origin == "manual")
    is_good_by_hand = exists().where(by_hand.c.id == runs.c.made_good_by, *is_of_slot)
    conditions = (text(OPEN_FAILURE_SQL), runs.c.acknowledged.is_not(None), is_good_by_hand)
    # A run is made after its slot, so few runs are read by their state and this instant. A
    # condition on the slot alone would have SQLite read all slots of the window instead.
    slot = func.coalesce(runs.c.slot, runs.c.created_at)
    of_slots = (slot >= since, slot < end, runs.c.origin != "manual", text(NO_PART_SQL))
    numbers = (
        func.coalesce(func.sum(case((condition, 1), else_=0)), 0) for condition in conditions
    )
    query = select(*numbers).select_from(runs)
    failed = query.where(runs.c.state == RunState.FAILED, runs.c.created_at >= since, *of_slots)
    is_open, is_known, is_by_hand = (await connection.execute(failed)).one()
    good = max(0, slots.failed - is_open - is_known)
    return FailedSlots(
        open=is_open,
        acknowledged=is_known,
        made_good_since=good,
        made_good_by_hand=min(is_by_hand, good),
    )


async def beside(connection: AsyncConnection, since: datetime, end: datetime) -> Beside:
    """The runs of the window without a slot of a schedule, by state; 10,000 of the newest ones are
    counted at most.
    """
    newest = (
        select(runs.c.state)
        .where(runs.c.created_at >= since, runs.c.created_at < end, text(BY_HAND_SQL))
        .order_by(runs.c.created_at.desc())
        .limit(MOST_COUNTED)
        .subquery()
    )
    rows = await connection.execute(select(newest.c.state, func.count()).group_by(newest.c.state))
    states = {row[0]: row[1] for row in rows}
    return Beside(
        runs=sum(states.values()),
        succeeded=states.get(RunState.SUCCEEDED, 0),
        failed=states.get(RunState.FAILED, 0),
        cancelled=states.get(RunState.CANCELLED, 0),
        active=sum(states.get(state, 0) for state in ACTIVE),
    )
