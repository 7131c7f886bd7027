"""`operations.slots`: what became of the slots of an interval, and runs for those of the past."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from service.operations import account, backfill
from service.operations.account import Accounts, SlotOutcome
from service.operations.backfill import BackfillCounts, BackfillRequest, BackfillSlot
from service.operations.context import Context


def ignore(slot: BackfillSlot) -> None:
    """For callers that want no single slot."""


class Slots:
    """Accounts for slots and backfills them. Each method raises DatabaseError where a database can't be used."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def account(
        self,
        since: datetime,
        until: datetime | None = None,
        task: str | None = None,
        see: Callable[[SlotOutcome], None] | None = None,
    ) -> Accounts:
        """What became of each slot from `since` to `until` (aware; None: now), of all tasks or of one.

        The slots are computed in a thread. `see` is called with each of them, on the event loop. Raises UnknownTask.
        """
        return await account.accounts(self._context, since, until, task, see)

    async def backfill(self, request: BackfillRequest, see: Callable[[BackfillSlot], None] = ignore) -> BackfillCounts:
        """Make runs for slots of the past; `see` is called with each slot. Raises InvalidParameters, UnknownTask."""
        return await backfill.run(self._context, request, see)
