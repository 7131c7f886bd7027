"""Slots that stay due although a service lives: something prevents them from being fired, and a
person has to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select

from batch_system import clock
from batch_system.batch.ledger.tables import schedules
from batch_system.batch.nodes.outage import Outage
from batch_system.database.engine import Database
from batch_system.database.statement_blocker import StatementBlocker

UNFIRED_SECONDS = 40.0
"""A slot that stays due for this long while the ledger works is unfired. An incident follows within
a minute.
"""
ASK_SECONDS = 10.0
"""After this time the database is asked which connection has locked the schedule."""
MOST_NAMED = 5


@dataclass(frozen=True)
class NotFired:
    """`since`: the first slot that stays due. `holder`: the connection that has locked the
    schedules. `in_words`: the problem and what to do, in one line.
    """

    since: datetime
    holder: str | None
    in_words: str


class Unfired:
    """The first due slot of each task, as the ledger was last read, and since when it has been
    due.
    """

    def __init__(self, database: Database, outage: Outage) -> None:
        self._outage = outage
        self._due: dict[str, tuple[datetime, float]] = {}
        self._blocker = StatementBlocker(database, rest=ASK_SECONDS)

    def are_due(self, slots: Mapping[str, datetime]) -> None:
        """The ledger says that these slots are due and not handled, and that all others are
        handled.

        An outage of the ledger is reported elsewhere. A slot that is due during an outage counts
        from the outage's end on.
        """
        now = clock.boottime()
        before = self._due if self._outage.cause is None else {}
        self._due = {
            name: before[name] if name in before and before[name][0] == slot else (slot, now)
            for name, slot in slots.items()
        }
        if not self._due:
            self._blocker.forget()
        elif now - min(since for _, since in self._due.values()) > ASK_SECONDS:
            is_open = (schedules.c.task == min(self._due), schedules.c.valid_until.is_(None))
            self._blocker.ask(select(schedules.c.id).where(*is_open).with_for_update())

    @property
    def slots(self) -> dict[str, datetime]:
        """The slots that have stayed due for UNFIRED_SECONDS, by task."""
        limit = clock.boottime() - UNFIRED_SECONDS
        return {name: slot for name, (slot, since) in self._due.items() if since <= limit}

    @property
    def found(self) -> NotFired | None:
        """The problem; None if there is none."""
        slots = self.slots
        if not slots:
            return None
        named = sorted(slots, key=lambda name: (slots[name], name))
        names = ", ".join(named[:MOST_NAMED]) + (
            f" and {len(named) - MOST_NAMED:,} more" if named[MOST_NAMED:] else ""
        )
        since, holder = slots[named[0]], self._blocker.in_words
        what = f"a service lives, but slots of {names} have not fired since {since:%H:%M:%S} UTC"
        if holder is not None:
            why = f"their schedules are locked by {holder}; end that transaction"
        else:
            why = (
                "see /readyz and the log of each service, and restart the one that does not say why"
            )
        return NotFired(since, holder, f"{what}: {why}")

    async def stop(self) -> None:
        await self._blocker.stop()
