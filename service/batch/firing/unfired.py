"""Slots that stay due although a service lives: something keeps them from being fired, which a person has to know."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import select

from service import clock
from service.batch.ledger.blocking import Blocker
from service.batch.ledger.tables import schedules
from service.batch.nodes.outage import Outage
from service.database.engine import Database

UNFIRED_SECONDS = 40.0
"""A slot that stays due for this time while the ledger can be read is unfired. An incident follows within a minute."""
ASK_SECONDS = 10.0
"""After this time the database is asked which connection has locked the schedule."""
MOST_NAMED = 5


class Unfired:
    """The first slot of each task that is due, as the ledger was just read, and since when it is."""

    def __init__(self, database: Database, outage: Outage) -> None:
        self._outage = outage
        self._due: dict[str, tuple[datetime, float]] = {}
        self._blocker = Blocker(database, rest=ASK_SECONDS)

    def are_due(self, slots: Mapping[str, datetime]) -> None:
        """The ledger says that these slots are due and were not handled. What is not among them was handled."""
        now = clock.boottime()
        before = self._due
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
    def in_words(self) -> str | None:
        """What is wrong, in one line with what to do; None if nothing is."""
        slots = self.slots
        if not slots:
            return None
        named = sorted(slots, key=lambda name: (slots[name], name))
        names = ", ".join(named[:MOST_NAMED]) + (f" and {len(named) - MOST_NAMED:,} more" if named[MOST_NAMED:] else "")
        what = f"a service lives, but slots are not fired since {slots[named[0]]:%H:%M:%S} UTC, of {names}"
        if (holder := self._blocker.in_words) is not None:
            return f"{what}: their schedules are locked by {holder}; end that transaction"
        if (outage := self._outage.in_words) is not None:
            return f"{what}: of the ledger, {outage}"
        return f"{what}: see /readyz and the log of each service, and restart the one that does not say why"

    async def stop(self) -> None:
        await self._blocker.stop()
