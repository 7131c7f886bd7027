"""The clock changes of a window, in the zones that schedules use: nights in which an hour is
repeated or left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from zoneinfo import ZoneInfo

from batch_system.batch.cron import utc_offsets
from batch_system.batch.cron.zones import zone_of
from batch_system.errors import BatchError
from batch_system.operations.night.results import NightChange

MOST_ZONES = 100


def clock_changes(names: Iterable[str], since: datetime, until: datetime) -> list[NightChange]:
    """One change for each instant and zones. `before` and `after`: the times of the clock, such as
    03:00 and 02:00.

    `since` and `until` are aware and in UTC. It computes with zones: call it in a thread.
    """
    found: dict[tuple[datetime, str, str], list[str]] = {}
    for name in sorted(set(names))[:MOST_ZONES]:
        try:
            zone = zone_of(name)
        except BatchError:  # another version of the service has written the schedule
            continue
        for at in _changes(zone, since.replace(microsecond=0), until.replace(microsecond=0)):
            before = at.astimezone(zone).replace(tzinfo=None) - utc_offsets.step(zone, at)
            after = at.astimezone(zone)
            found.setdefault((at, f"{before:%H:%M}", f"{after:%H:%M}"), []).append(name)
    return [
        NightChange(
            at=at,
            kind="clock.change",
            actor=", ".join(zones),
            task=None,
            before=before,
            after=after,
            note=None,
        )
        for (at, before, after), zones in sorted(found.items())
    ]


def _changes(zone: ZoneInfo, since: datetime, until: datetime) -> Iterable[datetime]:
    at = utc_offsets.change(zone, since, until) if since < until else None
    while at is not None:
        yield at
        at = utc_offsets.change(zone, at, until)
