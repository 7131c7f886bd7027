"""`operations.bulks`: changes of many runs, or of all slots of an interval, each with a preview."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from service.batch.ledger.tables import new_id
from service.operations.asking.context import Context
from service.operations.asking.filter import RunFilter
from service.operations.bulks import bulk, outage_backfills, retrying
from service.operations.bulks.bulk import Bulk, BulkAction, Preview
from service.operations.bulks.outage_backfills import BackfillPlan, BegunBackfill
from service.operations.bulks.retrying import RetryPlan
from service.operations.starting import backfill
from service.operations.starting.backfill import BackfillRequest, BackfillSlot


class Bulks:
    """Previews bulks, begins them and carries them out. Raises DatabaseError if the ledger can't be
    used.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._node = context.node or new_id()

    async def preview(self, action: BulkAction, wanted: RunFilter) -> Preview:
        """Which runs a bulk would change. Raises InvalidParameters, and UnknownTask.

        Without states in the filter, the runs of all states are meant that the action can change.
        """
        return await bulk.preview(self._context, action, wanted)

    async def plan_retry(self, incident: str, with_same_error: bool = False) -> RetryPlan:
        """What a retry of the failed runs of an incident would do. Nothing is retried yet. Raises
        UnknownIncident.

        `with_same_error`: also of the incidents that are one problem with it.
        """
        return await retrying.plan_retry(self._context, incident, with_same_error)

    async def preview_backfill(
        self,
        request: BackfillRequest,
        on_slot: Callable[[BackfillSlot], None] = backfill.ignore,
    ) -> Preview:
        """How many runs a backfill by the present schedule would make. `on_slot`: called for each
        of its slots.
        """
        return await bulk.preview_backfill(self._context, request, on_slot)

    async def plan_backfills(self, since: datetime, until: datetime) -> BackfillPlan:
        """What a backfill of all tasks with missed slots within an interval would do. No run is
        made yet.

        It is about the missed ranges that `operations.slots.leave` would be about: for each task
        from its first slot to its last one.
        """
        return await outage_backfills.plan(self._context, since, until)

    async def begin_backfills(
        self, previews: Sequence[str], note: str | None = None
    ) -> Sequence[BegunBackfill]:
        """Begin the backfills of a plan, by the ids of its previews. One that has begun already is
        left as it is.

        A backfill can't begin if its preview has expired, or its task has another schedule by now.
        Raises InvalidParameters, and UnknownPreview.
        """
        return await outage_backfills.begin(self._context, previews, note)

    async def begun_backfills(self, previews: Sequence[str]) -> Sequence[BegunBackfill]:
        """How far these backfills are. Raises as `begin_backfills`."""
        return await outage_backfills.begun(self._context, previews)

    async def begin(
        self, id: str, action: str, note: str | None = None, task: str | None = None
    ) -> Bulk:
        """Make a preview a bulk, which a service carries out. Raises UnknownPreview, and WrongState
        if it has begun.

        `action`: "bulk" or "backfill". `task`: the task that the backfill has to be of. A backfill
        is refused if the task has another schedule by now: its slots would be other ones. To
        acknowledge runs needs a note: without one it raises InvalidParameters.
        """
        return await bulk.begin(self._context, id, action, note, task)

    async def get(self, id: str) -> Bulk:
        """A preview or bulk as it is now. Raises UnknownPreview."""
        return await bulk.get(self._context, id)

    async def carry_out(self, id: str) -> None:
        """Carry out a bulk that has begun, as far as no other process does it at the same time."""
        await bulk.carry_out(self._context, self._node, id)
