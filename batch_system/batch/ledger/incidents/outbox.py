"""The outbox: what has to be sent, to which channel and when. The transaction that makes the change
also writes the messages about it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, TextClause, delete, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.incidents.tables import UNSENT_SQL, outbox
from batch_system.batch.ledger.tables import new_id

TOGETHER = timedelta(seconds=20)
"""Everything written within this time after a message is sent together, as one more message."""

MOST_TOGETHER = 500
"""At most this many rows of the outbox become one message."""

LONGEST_ERROR = 500


@dataclass(frozen=True)
class Note:
    """One thing to send to a channel. `kind`: "opened", "repeated", "closed", "digest" or "test".

    `content`: JSON, from which the message is made. `key`: things with the same key are sent only
    once. `not_before`: it is held back until then.
    """

    channel: str
    kind: str
    content: dict[str, Any]
    incident: str | None = None
    key: str | None = None
    not_before: datetime | None = None


async def write(connection: AsyncConnection, notes: Collection[Note], now: datetime) -> None:
    """Write what has to be sent. Rows that come shortly after another message to a channel wait,
    and are sent together.
    """
    due = {
        channel: await _due_at(connection, channel, now)
        for channel in sorted({note.channel for note in notes})
    }
    rows = [
        {
            "id": new_id(),
            "channel": note.channel,
            "kind": note.kind,
            "incident": note.incident,
            "content": json_rows.storable(note.content),
            "created_at": now,
            "due_at": max(due[note.channel], note.not_before or now),
            "key": note.key,
        }
        for note in notes
    ]
    await json_rows.insert(connection, outbox, rows, "(key) WHERE key IS NOT NULL")


async def _due_at(connection: AsyncConnection, channel: str, now: datetime) -> datetime:
    """When a row for this channel is sent: now, or together with others 20 seconds after the last
    message.
    """
    last = (
        await connection.execute(
            select(func.max(outbox.c.due_at)).where(outbox.c.channel == channel)
        )
    ).scalar()
    if last is None or last + TOGETHER <= now:
        return now
    following: datetime = last if last > now else last + TOGETHER
    return min(following, now + TOGETHER)


async def take(connection: AsyncConnection, channel: str, now: datetime) -> Sequence[Row[Any]]:
    """The rows that make the next message to this channel; empty if none is due. They all have the
    id of that message.

    A message that was not sent is taken again with the same rows and the same id.
    """
    due = (outbox.c.channel == channel, text(UNSENT_SQL), outbox.c.due_at <= now)
    first = (
        await connection.execute(
            select(outbox).where(*due).order_by(outbox.c.due_at, outbox.c.id).limit(1)
        )
    ).first()
    if first is None:
        return []
    if first.message is None:
        same = select(outbox.c.id).where(*due, outbox.c.message.is_(None), outbox.c.attempts == 0)
        ids = same.order_by(outbox.c.due_at, outbox.c.id).limit(MOST_TOGETHER)
        await connection.execute(
            update(outbox).where(outbox.c.id.in_(ids)).values(message=first.id)
        )
    message = select(outbox).where(
        outbox.c.channel == channel,
        text(UNSENT_SQL),
        outbox.c.message == (first.message or first.id),
    )
    return (await connection.execute(message.order_by(outbox.c.due_at, outbox.c.id))).all()


async def sent(connection: AsyncConnection, rows: Sequence[Row[Any]], now: datetime) -> None:
    """Record that a message was sent."""
    await _set(connection, rows, {"sent_at": now, "error": None, "attempts": outbox.c.attempts + 1})


async def failed(
    connection: AsyncConnection, rows: Sequence[Row[Any]], error: str, again_at: datetime
) -> None:
    """Record that a message could not be sent, and when it is tried again."""
    values = {"due_at": again_at, "error": error[:LONGEST_ERROR], "attempts": outbox.c.attempts + 1}
    await _set(connection, rows, values)


async def given_up(
    connection: AsyncConnection, rows: Sequence[Row[Any]], error: str, now: datetime
) -> None:
    """Record that a message will not be sent."""
    await _set(
        connection,
        rows,
        {"given_up_at": now, "error": error[:LONGEST_ERROR], "attempts": outbox.c.attempts + 1},
    )


async def give_up(
    connection: AsyncConnection,
    channels: Collection[str],
    before: datetime,
    error: str,
    now: datetime,
) -> None:
    """Give up the unsent messages to these channels that were written before an instant."""
    old = (outbox.c.channel.in_(sorted(channels)), text(UNSENT_SQL), outbox.c.created_at < before)
    await connection.execute(update(outbox).where(*old).values(given_up_at=now, error=error))


async def _set(
    connection: AsyncConnection, rows: Sequence[Row[Any]], values: dict[str, Any]
) -> None:
    theirs = json_rows.is_among(outbox.c.id, [row.id for row in rows], connection.dialect.name)
    await connection.execute(update(outbox).where(theirs).values(values))


async def next_due(connection: AsyncConnection) -> dict[str, datetime]:
    """For each channel with unsent messages, when the next one is due."""
    query = (
        select(outbox.c.channel, func.min(outbox.c.due_at))
        .where(text(UNSENT_SQL))
        .group_by(outbox.c.channel)
    )
    return {row[0]: row[1] for row in await connection.execute(query)}


def listing(
    limit: int,
    before: tuple[datetime, str] | None = None,
    state: str | None = None,
    channel: str | None = None,
) -> Select[Any]:
    """A query for a page of messages, the newest first. `before`: the (created_at, id) of the last
    one of the previous page. `state`: waiting, sent or given_up.
    """
    query = select(outbox).order_by(outbox.c.created_at.desc(), outbox.c.id.desc()).limit(limit)
    if before is not None:
        at, last = before
        is_older = (outbox.c.created_at == at) & (outbox.c.id < last)
        query = query.where((outbox.c.created_at < at) | is_older)
    if state is not None:
        query = query.where(_STATES[state])
    if channel is not None:
        query = query.where(outbox.c.channel == channel)
    return query


_STATES: dict[str, ColumnElement[bool] | TextClause] = {
    "waiting": text(UNSENT_SQL),
    "sent": outbox.c.sent_at.is_not(None),
    "given_up": outbox.c.given_up_at.is_not(None),
}


async def prune(connection: AsyncConnection, before: datetime) -> int:
    """Delete the rows that were written before, whether they were sent or not. Returns how many
    rows.
    """
    return (await connection.execute(delete(outbox).where(outbox.c.created_at < before))).rowcount
