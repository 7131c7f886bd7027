"""What became of the failed slots of a window, and of the runs without a slot."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Select, alias, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger.states import ACTIVE, RunState
from service.batch.ledger.tables import OPEN_FAILURE_SQL, runs
from service.operations.night.models import Beside, FailedSlots, SlotCounts

MOST_COUNTED = 10_000


async def failed_slots(connection: AsyncConnection, slots: SlotCounts, since: datetime, end: datetime) -> FailedSlots:
    """How many of the failed slots of the window are open, were acknowledged, or were made good since."""
    if not slots.failed:
        return FailedSlots(open=0, acknowledged=0, made_good_since=0, made_good_by_hand=0)
    in_window = (runs.c.slot >= since, runs.c.slot < end, runs.c.origin != "manual", runs.c.state == RunState.FAILED)
    opened = select(func.count()).select_from(runs).where(text(OPEN_FAILURE_SQL), *in_window)
    acknowledged = select(func.count()).select_from(runs).where(runs.c.acknowledged.is_not(None), *in_window)
    is_open = (await connection.execute(opened)).scalar_one()
    is_known = (await connection.execute(acknowledged)).scalar_one()
    good = max(0, slots.failed - is_open - is_known)
    by_hand = (await connection.execute(_made_good_by_hand().where(*in_window))).scalar_one() if good else 0
    return FailedSlots(open=is_open, acknowledged=is_known, made_good_since=good, made_good_by_hand=by_hand)


def _made_good_by_hand() -> Select[Any]:
    """Failed runs that a run by hand for the same slot has made good."""
    by_hand = alias(runs)
    joined = runs.join(by_hand, by_hand.c.id == runs.c.made_good_by)
    is_same = (by_hand.c.slot == runs.c.slot, by_hand.c.origin == "manual")
    return select(func.count()).select_from(joined).where(*is_same)


async def beside(connection: AsyncConnection, since: datetime, end: datetime) -> Beside:
    """The runs of the window without a slot of a schedule, by state; 10,000 of the newest ones are counted at most."""
    newest = (
        select(runs.c.state, runs.c.origin)
        .where(runs.c.created_at >= since, runs.c.created_at < end, runs.c.origin == "manual")
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
