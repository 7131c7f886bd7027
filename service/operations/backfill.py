"""Makes runs for slots of the past on request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from service.batch.firing import backfill
from service.batch.firing.backfill import Backfill, SlotAction, SlotDecision
from service.errors import InvalidParameters
from service.operations.context import Context
from service.operations.results import Result

MOST_SLOTS = 10_000
"""A backfill of more slots is refused unless the request allows it, because it may be a mistake."""


@dataclass(frozen=True)
class BackfillRequest:
    """The request for a backfill.

    Attributes:
        task: The name of a loaded task.
        since: The first instant, aware.
        until: The last instant, aware, included.
        redo: Give runs that have ended a new attempt from the beginning.
        allow_many: Allow more than MOST_SLOTS slots.
        dry_run: Change nothing.
    """

    task: str
    since: datetime
    until: datetime
    redo: bool = False
    allow_many: bool = False
    dry_run: bool = False


class BackfillSlot(Result):
    """A slot of a backfill: `action` is new, again or left; `run` and `state` are those of the run that it had."""

    slot: datetime
    action: str
    run: str | None
    state: str | None


class BackfillCounts(Result):
    """How many slots got a run (`new`), had their run repeated (`again`), or were unchanged (`left`)."""

    new: int
    again: int
    left: int

    @property
    def slots(self) -> int:
        """The number of all slots."""
        return self.new + self.again + self.left


async def run(context: Context, request: BackfillRequest, on_slot: Callable[[BackfillSlot], None]) -> BackfillCounts:
    """Make the runs, unless it is a dry run. `on_slot` is called with each slot.

    Raises InvalidParameters, UnknownTask and DatabaseError.
    """
    task = context.task(request.task)
    databases = context.databases
    if not request.dry_run:
        await databases.migrate_both()
    async with databases.reading() as connection:
        if connection is None:
            raise InvalidParameters(f"task {task.name}: there is no ledger yet, so there are no slots to backfill")
        interval = await backfill.interval_of(connection, task.name, request.since, request.until)
    if not request.allow_many and await interval.count(MOST_SLOTS) > MOST_SLOTS:
        raise InvalidParameters(
            f"task {task.name}: there are more than {MOST_SLOTS:,} slots in this interval; --yes allows that"
        )
    task_backfill = Backfill(databases.ledger, databases.application, task, context.actor, request.redo)

    def pass_on(decision: SlotDecision) -> None:
        on_slot(BackfillSlot(**decision._asdict()))

    counts = await (task_backfill.look if request.dry_run else task_backfill.make)(interval, pass_on)
    context.wake()
    return BackfillCounts(new=counts[SlotAction.NEW], again=counts[SlotAction.AGAIN], left=counts[SlotAction.LEFT])
