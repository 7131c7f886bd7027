"""Outages: times without a service, which the next one notices when it starts, or times in which
the living services did not fire. Slots that were missed during an outage belong to its incident.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.firing.unfired import NotFired
from batch_system.batch.incidents.overdue import in_words
from batch_system.batch.ledger.incidents import incidents
from batch_system.batch.ledger.incidents.incidents import Opening
from batch_system.batch.ledger.incidents.tables import incidents as incidents_table
from batch_system.batch.ledger.states import IncidentKind
from batch_system.batch.ledger.tables import nodes

FIRING = timedelta(seconds=5)
"""A slot that was due this shortly before the last sign of life may have been about to fire."""

MOST_NAMED = 5
"""At most this many tasks whose slots did not run are named."""

SHORTEST = timedelta(minutes=1)
"""A shorter time without a service is no outage, because slots wait that long before they count as
missed.
"""


async def before_node(connection: AsyncConnection, node: str) -> tuple[datetime, datetime] | None:
    """The time in which no service lived before this node started; None if it is less than a
    minute.

    Services that started less than a minute before this node also count as started after the
    outage.
    """
    started = (
        await connection.execute(select(nodes.c.started_at).where(nodes.c.id == node))
    ).scalar()
    if started is None:
        return None
    last_sign = func.coalesce(func.nullif(nodes.c.stopped_at, nodes.c.lost_at), nodes.c.seen_at)
    older = select(func.max(last_sign)).where(
        nodes.c.fires, nodes.c.started_at < started - SHORTEST
    )
    since: datetime | None = (await connection.execute(older)).scalar()
    if since is None:
        return None
    newer = select(func.min(nodes.c.started_at)).where(nodes.c.fires, nodes.c.started_at > since)
    until: datetime = (await connection.execute(newer)).scalar() or started
    return (since, until) if until - since >= SHORTEST else None


@dataclass(frozen=True)
class Outage:
    """The incident of an outage, and its details. They have no `until` while the outage lasts."""

    incident: str
    details: dict[str, Any]

    def has(self, first: datetime, last: datetime) -> bool:
        """Whether all of these slots belong to it. Slots that a living service did not fire do
        not.
        """
        since, until = _begin_and_end(self.details, last)
        return since - FIRING <= first and last <= until + SHORTEST


async def since(connection: AsyncConnection, at: datetime) -> list[Outage]:
    """The outages that were noticed since then, and the open one of services that live and do not
    fire.
    """
    columns = (incidents_table.c.id, incidents_table.c.details)
    is_down = (incidents_table.c.kind == IncidentKind.DOWN, incidents_table.c.opened_at >= at)
    rows = [*await connection.execute(select(*columns).where(*is_down))]
    rows += await incidents.are_open(connection, [IncidentKind.UNFIRED])
    return [Outage(row.id, row.details) for row in rows if row.details]


async def is_known(connection: AsyncConnection, first: datetime, last: datetime) -> bool:
    """Whether all slots between these two instants belong to an outage that was noticed."""
    return any(outage.has(first, last) for outage in await since(connection, first))


def has_slots(incident: Row[Any]) -> bool:
    """Whether slots that did not run belong to this incident."""
    return bool((incident.details or {}).get("slots"))


def of_living(unfired: NotFired, now: datetime) -> Opening:
    """The incident of services that live and do not fire. Slots that are missed meanwhile belong to
    it.
    """
    details = {"since": unfired.since.isoformat(), "holder": unfired.holder}
    return Opening(IncidentKind.UNFIRED, unfired.in_words, now, details=details)


async def add_slots(
    connection: AsyncConnection, outage: Outage, slots: Mapping[str, int], now: datetime
) -> None:
    """Add the number of slots of each task that did not run because of this outage."""
    known = Counter(outage.details.get("slots") or {}) + Counter(slots)
    details = outage.details | {"slots": dict(known)}
    values = {"details": details, "text": _text_of(details, now), "count": sum(known.values())}
    await connection.execute(
        update(incidents_table).where(incidents_table.c.id == outage.incident).values(values)
    )


def _begin_and_end(details: Mapping[str, Any], now: datetime) -> tuple[datetime, datetime]:
    begin, end = details["since"], details.get("until")
    return datetime.fromisoformat(begin), datetime.fromisoformat(end) if end is not None else now


def _text_of(details: Mapping[str, Any], now: datetime) -> str:
    """What an outage has caused, with the next step."""
    begin, end = _begin_and_end(details, now)
    day = "" if begin.date() == end.date() else f"{end:%Y-%m-%d} "
    what = details.get(
        "what",
        "no service fired" if "until" in details else "a service lived, but slots were not fired,",
    )
    text = (
        f"{what} from {begin:%Y-%m-%d %H:%M:%S} to {day}{end:%H:%M:%S} UTC "
        f"({in_words(end - begin)})"
    )
    if holder := details.get("holder"):
        text += f": their schedules were locked by {holder}"
    elif cause := details.get("cause"):
        text += f": the ledger could not be used ({cause})"
    slots = details.get("slots") or {}
    if not slots:
        return text
    number, names = sum(slots.values()), sorted(slots)
    of = (
        f"{len(names):,} tasks ({', '.join(names[:MOST_NAMED])}, …)"
        if len(names) > MOST_NAMED
        else ", ".join(names)
    )
    did = f"{number:,} slot{'' if number == 1 else 's'} of {of} did not run"
    return f"{text}. {did}; `batch night` lists them, `batch backfill` runs them."


async def record(
    connection: AsyncConnection,
    since: datetime,
    until: datetime,
    now: datetime,
    is_silent: bool = False,
    cause: str | None = None,
    what: str | None = None,
) -> None:
    """Open the incident of an outage. Its missed slots belong to it, and so get no incidents of
    their own.

    `is_silent`: nothing is sent about it. `cause`: why living services could not use the ledger.
    `what`: what was wrong, if there were living services.
    """
    words = {name: words for name, words in (("cause", cause), ("what", what)) if words is not None}
    details = {"since": since.isoformat(), "until": until.isoformat(), **words}
    opening = Opening(
        IncidentKind.DOWN,
        _text_of(details, until),
        until,
        subject=since.isoformat(),
        details=details,
    )
    rows = await incidents.open_or_continue(connection, [opening], now)
    if is_silent:
        await incidents.told(connection, rows, now)
