"""A histogram of durations: how many were at most as long as each of some bounds."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

BOUNDS = (
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
    900.0,
    1_800.0,
    3_600.0,
    7_200.0,
    21_600.0,
)
"""The upper bounds of the buckets in seconds, from 0.01 seconds to 6 hours. One more bucket has all
longer durations.
"""


class Buckets(NamedTuple):
    """The content of a histogram at one instant. `counts`: of each single bucket. `total`: the sum
    in seconds.
    """

    counts: tuple[int, ...]
    total: float


class Histogram:
    """Durations in seconds. One thread adds them; any other may read them meanwhile."""

    __slots__ = ("_counts", "_total")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._total = 0.0

    def add(self, seconds: float) -> None:
        """Add a duration. A negative one, caused by a clock that was set back, counts as zero."""
        seconds = max(0.0, seconds)
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._total += seconds

    def buckets(self) -> Buckets:
        """The durations that were added so far."""
        return Buckets(tuple(self._counts), self._total)
