"""The digest: a summary of the night, written once for each slot of BATCH_DIGEST_CRON and then
sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError

from batch_system.batch.cron.cron import schedule
from batch_system.batch.incidents.telling import HIDDEN
from batch_system.batch.ledger import database_time
from batch_system.batch.ledger.incidents import outbox
from batch_system.batch.ledger.incidents.outbox import Note
from batch_system.batch.nodes.ledger_poll import LedgerChanges
from batch_system.concurrency.background import Background
from batch_system.database.engine import Database
from batch_system.errors import BatchError
from batch_system.logs import get_logger
from batch_system.operations.asking.actor import Actor
from batch_system.operations.night.night import night as night_of
from batch_system.operations.night.sentence import in_danger
from batch_system.operations.operations import Operations
from batch_system.words import kept_back_in_words

if TYPE_CHECKING:  # importing it takes long, and the start does not need it
    from batch_system.operations.night.results import Night

logger = get_logger("batch_system.batch")

MOST_ROWS = 20
READER = Actor("digest", role="viewer", source="service")
"""Anybody may read a channel, so a digest says no more than a viewer may see."""
AGAIN = timedelta(minutes=1)
"""The wait until a digest that could not be written is tried again."""


class Digest(Background):
    """Works on the node that has the duty of the watch. `cron` is in UTC. `channels`: the names of
    its channels.
    """

    turn_seconds = 60.0

    def __init__(
        self,
        operations: Operations,
        ledger: Database,
        cron: str,
        channels: Sequence[str],
        holds: Callable[[], bool],
    ) -> None:
        self._operations = operations.by(READER)
        self._ledger = ledger
        self._channels = channels
        self._holds = holds
        self._schedule = schedule(cron)
        self._woken = asyncio.Event()
        self._next: datetime | None = None
        self._due: datetime | None = None
        self._again_at = datetime.min.replace(tzinfo=UTC)

    def on_changes(self, changes: LedgerChanges) -> None:
        """Take the result of a ledger poll, which shows the time."""
        if self._next is None:
            self._next = self._schedule.next(changes.now)
        elif changes.now >= self._next:
            self._due = self._next
            self._next = self._schedule.next(changes.now)
            self._again_at = changes.now
        if self._due is not None and changes.now >= self._again_at:
            self._again_at = changes.now + AGAIN
            self._woken.set()

    async def _loop(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            if not self._holds() or self._due is None:
                self._due = None
                continue
            try:
                async with self.limited_turn():
                    await self._write(self._due)
                self._due = None
            except BatchError as error:
                logger.warning(
                    "the digest could not be written, the next attempt is in a minute: "
                    f"{error.message}"
                )
            except (DBAPIError, OSError) as error:
                why = self._ledger.why(error)
                logger.warning(
                    f"the digest could not be written, the next attempt is in a minute: {why}"
                )
            except Exception:  # the background loop's boundary
                logger.exception("the digest could not be written, the next attempt is in a minute")

    async def _write(self, slot: datetime) -> None:
        night = await night_of(self._operations.context)
        content = {"kind": "digest", "title": night.headline, "text": text_of(night)}
        async with self._ledger.engine.begin() as connection:
            now = await database_time.now_of(connection)
            key = f"digest {slot.astimezone(UTC).isoformat()}"
            notes = [Note(name, "digest", content, key=f"{key} {name}") for name in self._channels]
            await outbox.write(connection, notes, now)


def text_of(night: Night) -> str:
    """The summary as plain text."""
    lines = [night.headline, night.sentence]
    lines += [
        f"- {each.text}{f'. {each.why}' if each.why else ''}"
        for each in in_danger(night.forecast)[:MOST_ROWS]
    ]
    for need in night.needs[:MOST_ROWS]:
        owner = f" ({need.owner})" if need.owner else ""
        keeps = f"; keeps back {kept_back_in_words(need.keeps_back)}" if need.keeps_back else ""
        lines.append(
            f"- {need.task or need.subject or need.kind}{owner}: {need.error or HIDDEN}{keeps}"
        )
    if (rest := len(night.needs) - MOST_ROWS) > 0:
        lines.append(f"- and {rest:,} more")
    if night.late:
        lines.append(
            "Late or slow: " + ", ".join(sorted({run.task for run in night.late})[:MOST_ROWS])
        )
    lines += [
        f"Did not run: {each.slots:,} slots, {each.cause}"
        + (f" by {each.by}" if each.by else f" {each.after.task}" if each.after else "")
        for each in night.did_not_run[:MOST_ROWS]
    ]
    return "\n".join(lines)
