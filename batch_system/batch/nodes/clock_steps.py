"""Steps of the ledger's clock: jumps forward while this process lived.

The time since boot passes evenly, even if the wall clock is set. If the ledger's clock moves
forward by more than the time since boot, it was set; no downtime explains the difference. The new
time may be wrong, so it is believed only if the next look still finds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from batch_system import clock
from batch_system.batch.nodes.ledger_poll import LOOK_SECONDS
from batch_system.batch.tasks.declaration import ON_TIME

AHEAD = ON_TIME
"""A larger difference between two clocks is reported and acted upon."""

SET_FORWARD = "the clock was set forward"
"""The beginning of the reason for slots that a clock step has passed over."""

TRUSTED_AFTER = timedelta(minutes=10)
"""How much later slots that a clock step has passed over are caught up. If the clock is set back
before, they don't run.
"""


@dataclass(frozen=True)
class ClockStep:
    """The ledger's clock jumped from `began` to `ended`. Both are aware."""

    began: datetime
    ended: datetime

    def covers(self, slot: datetime) -> bool:
        return self.began < slot <= self.ended

    def explains(self, first: datetime, last: datetime) -> bool:
        """Whether the step is why slots between these instants were missed. The first ones may have
        been due before it, and not fired yet: they were still on time.
        """
        return self.began - AHEAD < first and last <= self.ended

    @property
    def trusted_at(self) -> datetime:
        return self.ended + TRUSTED_AFTER

    def __str__(self) -> str:
        return (
            f"{SET_FORWARD}, from {self.began:%Y-%m-%d %H:%M:%S} to {self.ended:%Y-%m-%d %H:%M:%S} "
            "UTC"
        )


class ClockSteps:
    """Compares the ledger's clock with the time since boot at each reading of the clock."""

    def __init__(self) -> None:
        self._most: float | None = None
        """The most seconds by which the ledger's clock was ahead of the time since boot; None
        before the first reading.
        """
        self._believed = datetime.min.replace(tzinfo=UTC)
        self._doubted_at: float | None = None
        self.last: ClockStep | None = None
        """The last step that was believed."""

    def is_doubtful(self, now: datetime, asked_at: float, read_at: float | None = None) -> bool:
        """Whether the ledger's clock, which says `now`, has just been set forward, so that nothing
        should fire yet.

        `asked_at`, `read_at`: the boot times before and after the clock was read. A difference
        within that interval proves nothing.
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
        """The last step, if it affects a schedule with this cursor.

        A cursor that was ahead of the clock before the step shows that this clock was behind, and
        that the step has corrected it.
        """
        return (
            self.last if self.last is not None and fired_until <= self.last.began + AHEAD else None
        )
