"""The bar of a run that is late or slow: how long it has taken, what is usual, and when it may end.
Pure geometry.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from batch_system.operations.runs.waiting import LateRun
from batch_system.pages.charts.axis import Axis
from batch_system.pages.frame.formatting import clock, duration

ROOM = 0.04
"""This much of the bar is left after the last mark."""


@dataclass(frozen=True)
class LateBar:
    """`head`: the present. `usual`: where 95 of 100 runs have ended. `end`: about where this one
    ends. All x are in percent.
    """

    css: str
    begin_label: str
    head: float
    usual: float | None
    usual_label: str
    end: float | None
    end_label: str
    following: float | None
    following_label: str
    words: str


def late_bar(run: LateRun, now: datetime, zone: ZoneInfo) -> LateBar:
    """The bar begins where the run began, or where it began to wait."""
    begin = now - timedelta(seconds=run.elapsed)
    usual = (
        begin + timedelta(seconds=run.p95)
        if run.p95 is not None and run.state == "running"
        else None
    )
    marks = [at for at in (usual, run.eta, run.next_attempt_at) if at is not None]
    last = max([now, *marks])
    axis = Axis(begin, last + (last - begin) * ROOM + timedelta(seconds=1), zone)
    end = run.eta if run.eta is not None and run.eta > now else None
    following = run.next_attempt_at
    return LateBar(
        css="retrying" if run.why == "retries" else run.state,
        begin_label=clock(begin, zone),
        head=axis.x(now),
        usual=axis.x(usual) if usual is not None else None,
        usual_label=f"p95 {duration(run.p95)}" if usual is not None else "",
        end=axis.x(end) if end is not None else None,
        end_label=clock(end, zone) if end is not None else "",
        following=axis.x(following) if following is not None else None,
        following_label=clock(following, zone) if following is not None else "",
        words=f"since {clock(begin, zone)}"
        + (f", ends about {clock(end, zone)}" if end is not None else ""),
    )
