"""Steps of the ledger's clock: times over which it went forward at once, while this process lived.

Time since boot passes as it does, whatever somebody does to the wall clock. If the ledger's clock
goes forward by more than the time since boot, nobody was down: a clock was set. It may be wrong, so
it is believed only if it still says the same at the next look.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from service import clock
from service.batch.nodes.ledger_poll import LOOK_SECONDS
from service.batch.tasks.declaration import ON_TIME

AHEAD = ON_TIME
"""A difference between two clocks from which on it is reported, and acted upon."""

SET_FORWARD = "the clock was set forward"
"""How the reason of slots begins over which a clock was set."""

TRUSTED_AFTER = timedelta(minutes=10)
"""How much later slots over which a clock was set are caught up. If it was wrong and is set back,
they don't run.
"""


@dataclass(frozen=True)
class ClockStep:
    """The ledger's clock went from `began` to `ended` at once. Both are aware."""

    began: datetime
    ended: datetime

    def covers(self, slot: datetime) -> bool:
        return self.began < slot <= self.ended

    @property
    def trusted_at(self) -> datetime:
        return self.ended + TRUSTED_AFTER

    def __str__(self) -> str:
        return (
            f"{SET_FORWARD}, from {self.began:%Y-%m-%d %H:%M:%S} to {self.ended:%Y-%m-%d %H:%M:%S} "
            "UTC"
        )


class ClockSteps:
    """Compares the ledger's clock with the time since boot, each time it was read."""

    def __init__(self) -> None:
        self._most: float | None = None
        """How far the ledger's clock is ahead of the time since boot, in seconds, at most; None: it
        was never read.
        """
        self._believed = datetime.min.replace(tzinfo=UTC)
        self._doubted_at: float | None = None
        self.last: ClockStep | None = None
        """The last step that was believed."""

    def is_doubtful(self, now: datetime, asked_at: float, read_at: float | None = None) -> bool:
        """Whether the ledger's clock, which says `now`, has just been set forward, so that nothing
        is to be fired yet.

        `asked_at`, `read_at`: the boot times before and after it was read. Time between them proves
        nothing.
        """
        if clock.is_moved():
            return False
        read_at = clock.boottime() if read_at is None else read_at
        least, most = now.timestamp() - read_at, now.timestamp() - asked_at
        step = timedelta(seconds=least - (most if self._most is None else self._most))
        if step > AHEAD:
            if self._doubted_at is None:
                self._doubted_at = read_at
            if read_at < self._doubted_at + LOOK_SECONDS:
                return True
            self.last = ClockStep(self._believed, now)
        self._most = most
        self._believed = now
        self._doubted_at = None
        return False

    def over(self, fired_until: datetime) -> ClockStep | None:
        """The last step, if it concerns a schedule with this cursor.

        If the cursor was ahead of the clock before the step, that clock was behind, and the step
        has set it right.
        """
        return (
            self.last if self.last is not None and fired_until <= self.last.began + AHEAD else None
        )
