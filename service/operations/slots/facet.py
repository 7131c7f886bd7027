"""`operations.slots`: the account of the slots of an interval, and backfills."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from service.operations.context import Context
from service.operations.slots import account, backfill
from service.operations.slots.account import Accounts, SlotOutcome
from service.operations.slots.backfill import BackfillCounts, BackfillRequest, BackfillSlot


class Slots:
    """Accounts for slots and backfills them. Each method raises DatabaseError if a database can't be used."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def account(
        self,
        since: datetime,
        until: datetime | None = None,
        task: str | None = None,
        on_slot: Callable[[SlotOutcome], None] | None = None,
    ) -> Accounts:
        """What became of each slot from `since` to `until` (aware; None: now), of all tasks or of one.

        The slots are computed in a thread. `on_slot` is called with each, on the event loop. Raises UnknownTask.
        """
        return await account.accounts(self._context, since, until, task, on_slot)

    async def backfill(
        self, request: BackfillRequest, on_slot: Callable[[BackfillSlot], None] = backfill.ignore
    ) -> BackfillCounts:
        """Make runs for slots of the past; `on_slot` gets each slot. Raises InvalidParameters and UnknownTask."""
        return await backfill.run(self._context, request, on_slot)
