"""An outage of the ledger. Only this module of a process knows since when the ledger can't be used,
and why.

Logs, `/readyz`, the records of missed slots and the audit all read it here.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import Counter, deque
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.exc import DBAPIError

from batch_system import clock
from batch_system.database import troubles
from batch_system.database.engine import Database
from batch_system.errors import DatabaseError
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

QUIET_SECONDS = 5.0
"""An outage has ended when nothing has failed for this time, because a database that is nearly full
works now and then.
"""
TOLERANCE = timedelta(seconds=10)
"""Slots belong to an outage if they begin at most this long before its first failure, and end at
most this long after its last.
"""
MOST_KEPT = 100
"""The most past outages that are kept until they are written to the ledger."""


@dataclass(frozen=True)
class Interval:
    """The time in which this process could not use the ledger, by its machine's clock (UTC), and
    why, without addresses.
    """

    since: datetime
    until: datetime
    cause: str

    def covers(self, first: datetime, last: datetime) -> bool:
        return self.since - TOLERANCE <= first and last <= self.until + TOLERANCE


class Outage:
    """Each part of a service reports its failures and successes. Any thread may call the methods.

    SQLite may let one part read while another waits for the write lock, so the outage lasts until
    all parts that have failed work again.
    """

    cause: str | None = None
    """Why the ledger can't be used now, in one line for a log; None while it can."""
    _reason = ""

    def __init__(self) -> None:
        self._failing: set[str] = set()
        self._tries: Counter[str] = Counter()
        self._began_at = self._failed_at = 0.0
        self._since: datetime | None = None
        self._past: deque[Interval] = deque(maxlen=MOST_KEPT)
        self._unwritten: deque[Interval] = deque(maxlen=MOST_KEPT)
        self._lock = threading.Lock()

    def cause_for(self, part: str, ledger: Database, error: BaseException) -> str | None:
        """Why this part can't use the ledger. None if the error is not about the ledger; the part
        then logs it itself.

        The first failure of an outage is logged here.
        """
        if not isinstance(error, DBAPIError | DatabaseError | OSError):
            return None
        cause = ledger.why(error)
        if ledger.has_severed(error):  # the next try opens a new connection
            return cause
        with self._lock:
            self._failed_at = clock.boottime()
            self._failing.add(part)
            self._tries[part] += 1
            is_new = self.cause is None
            if is_new:
                self._began_at = self._failed_at
                self._since = clock.now()
            self.cause = cause
            self._reason = _in_words(error) or (type(error).__name__ if is_new else self._reason)
        if is_new:
            logger.warning(
                "the ledger can't be used; the service retries until it can (first noticed by the "
                f"{part}); no slot is fired, "
                f"and outcomes of runs are kept until then: {cause}"
            )
        return cause

    @property
    def in_words(self) -> str | None:
        """Since when the ledger can't be used, and why, without addresses, so that anybody may read
        it; None while it can.
        """
        with self._lock:
            if self.cause is None or self._since is None:
                return None
            return f"it can't be used since {self._since:%H:%M:%S} UTC: {self._reason}"

    def has_failed(self, part: str) -> bool:
        """Whether this part has failed in this outage, and not used the ledger since.

        A part that acts only when there is work for it checks this at each poll. Another node may
        have done the work meanwhile, and then nothing else would make the part report that it works
        again.
        """
        return part in self._failing

    def over_for(self, part: str) -> None:
        """This part has used the ledger. Logs the end of the outage once all parts work and nothing
        has failed for a while.
        """
        if self.cause is None:
            return
        with self._lock:
            self._failing.discard(part)
            if (
                self.cause is None
                or self._failing
                or clock.boottime() < self._failed_at + QUIET_SECONDS
            ):
                return
            assert self._since is not None
            seconds = self._failed_at - self._began_at
            interval = Interval(self._since, self._since + timedelta(seconds=seconds), self._reason)
            self._past.append(interval)
            self._unwritten.append(interval)
            tries = self._tries
            self._tries = Counter()
            self.cause = None
        counts = ", ".join(f"{name} {number:,}" for name, number in sorted(tries.items()))
        logger.info(
            f"the ledger is reachable again after {max(1, round(seconds))} s; what failed "
            f"meanwhile: {counts}"
        )

    def why_missed(self, first: datetime, last: datetime) -> str | None:
        """Why this process did not fire the slots between these two instants, if an outage is the
        reason.
        """
        outage = self.during(first, last)
        if outage is None:
            return None
        return (
            f"pid {os.getpid()} on {socket.gethostname()} could not use the ledger from "
            f"{outage.since:%H:%M:%S} UTC on"
        )

    def during(self, first: datetime, last: datetime) -> Interval | None:
        """The outage of this process that covers the time between these two instants, if any."""
        with self._lock:
            known = list(self._past)
            if self.cause is not None and self._since is not None:
                known.append(Interval(self._since, clock.now(), self._reason))
        return next((each for each in reversed(known) if each.covers(first, last)), None)

    def unwritten(self) -> list[Interval]:
        """The past outages that were not written to the ledger yet."""
        return list(self._unwritten)

    def are_written(self, intervals: list[Interval]) -> None:
        """These outages are in the ledger."""
        with self._lock:
            for interval in intervals:
                self._unwritten.remove(interval)


def _in_words(error: BaseException) -> str | None:
    """What is wrong, without addresses and without the text of a statement; None if the error does
    not say it.
    """
    if (advice := troubles.advice_on(error)) is not None:
        return advice
    if isinstance(error, TimeoutError):
        return "it does not answer in time"
    return "its server can't be reached" if isinstance(error, OSError) else None
