"""`operations.slots`: the account of an interval, backfills, and missed slots that are left."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from service.operations.asking.context import Context
from service.operations.slots import account, leaving
from service.operations.slots.account import Accounts, SlotOutcome
from service.operations.slots.leaving import LeftSlots
from service.operations.starting import backfill
from service.operations.starting.backfill import BackfillCounts, BackfillRequest, BackfillSlot


class Slots:
    """Accounts for slots, backfills and leaves them. Each method raises DatabaseError if a database
    can't be used.
    """

    def __init__(self, context: Context) -> None:
        self._context = context

    async def account(
        self,
        since: datetime,
        until: datetime | None = None,
        task: str | None = None,
        on_slot: Callable[[SlotOutcome], None] | None = None,
    ) -> Accounts:
        """What became of each slot from `since` to `until` (aware; None: now), of all tasks or of
        one.

        The slots are computed in a thread. `on_slot` is called with each, on the event loop. Raises
        UnknownTask.
        """
        return await account.accounts(self._context, since, until, task, on_slot)

    async def backfill(
        self, request: BackfillRequest, on_slot: Callable[[BackfillSlot], None] = backfill.ignore
    ) -> BackfillCounts:
        """Make runs for slots of the past; `on_slot` gets each slot. Raises InvalidParameters and
        UnknownTask.
        """
        return await backfill.run(self._context, request, on_slot)

    async def leave(
        self,
        since: datetime,
        until: datetime,
        note: str | None = None,
        task: str | None = None,
        slots: int | None = None,
        *,
        dry_run: bool = False,
    ) -> LeftSlots:
        """Say that nothing has to be done about missed slots, and why: Night no longer asks to
        watch them.

        It is about the missed ranges that lie within `since` and `until` (aware, both included), of
        all tasks or of one, and that neither a pause has caused nor anybody has left before.
        `slots`: how many the caller has seen; if there are others by now, it raises WrongState.
        Raises InvalidParameters if the note is too short or too long, and UnknownTask. With
        `dry_run` nothing is changed, and no note is needed.
        """
        if dry_run:
            return await leaving.look(self._context, since, until, task)
        return await leaving.leave(self._context, since, until, note, task, slots)

    async def reopen(self, since: datetime, until: datetime, task: str | None = None) -> LeftSlots:
        """Undo `leave` for the missed ranges within an interval. Raises UnknownTask."""
        return await leaving.reopen(self._context, since, until, task)
