"""Queries on tokens and sessions. A secret is compared by its hash, and the database decides who
uses a link first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Select, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger.people.access_tables import sessions, tokens

TOKEN = "token"  # noqa: S105 - a kind of row, no secret
LINK = "link"


MOST_SESSIONS = 200
"""A list has at most this many sessions."""


async def add_token(connection: AsyncConnection, **columns: Any) -> bool:
    """Insert a token or a link. Returns False if another token that is not revoked has the same
    name.
    """
    try:
        async with connection.begin_nested():
            await connection.execute(insert(tokens).values(columns))
    except IntegrityError:
        return False
    return True


async def listed(connection: AsyncConnection) -> Sequence[Mapping[Any, Any]]:
    """The tokens that were ever made, newest first, without links."""
    query = (
        select(tokens)
        .where(tokens.c.kind == TOKEN)
        .order_by(tokens.c.created_at.desc(), tokens.c.id)
    )
    return (await connection.execute(query)).mappings().all()


async def has_token(connection: AsyncConnection) -> bool:
    """Whether a token was ever made, including those that are revoked by now."""
    return (
        await connection.execute(select(tokens.c.id).where(tokens.c.kind == TOKEN).limit(1))
    ).first() is not None


def token(key: str, now: datetime) -> Select[Any]:
    """A query for a token or link with this key that is neither revoked nor expired."""
    is_valid = or_(tokens.c.expires_at.is_(None), tokens.c.expires_at > now)
    return select(tokens).where(tokens.c.id == key, tokens.c.revoked_at.is_(None), is_valid)


def expired(key: str, now: datetime) -> Select[Any]:
    """A query for a token with this key that was valid until it expired."""
    return select(tokens).where(
        tokens.c.id == key,
        tokens.c.kind == TOKEN,
        tokens.c.revoked_at.is_(None),
        tokens.c.expires_at <= now,
    )


async def revoke(connection: AsyncConnection, name: str, by: str, now: datetime) -> str | None:
    """Revoke a token, by its name or key, and the sessions that were made with it. Returns its key,
    or None.
    """
    is_meant = or_(tokens.c.name == name, tokens.c.id == name)
    revoking = update(tokens).where(is_meant, tokens.c.kind == TOKEN, tokens.c.revoked_at.is_(None))
    statement = revoking.values(revoked_at=now, revoked_by=by).returning(tokens.c.id)
    key: str | None = (await connection.execute(statement)).scalar()
    if key is not None:
        theirs = update(sessions).where(sessions.c.token == key, sessions.c.revoked_at.is_(None))
        await connection.execute(theirs.values(revoked_at=now))
    return key


async def take_link(
    connection: AsyncConnection, key: str, address: str | None, now: datetime
) -> bool:
    """Use up a link. Returns False if it was used before."""
    statement = update(tokens).where(
        tokens.c.id == key, tokens.c.kind == LINK, tokens.c.revoked_at.is_(None)
    )
    used = {"revoked_at": now, "revoked_by": "its use", "used_at": now, "used_from": address}
    return (await connection.execute(statement.values(used))).rowcount == 1


async def note_uses(
    connection: AsyncConnection, uses: Mapping[str, tuple[datetime, str | None]]
) -> None:
    """Record when, and from which address, each of these tokens was used last."""
    for key, (at, address) in sorted(uses.items()):
        await connection.execute(
            update(tokens).where(tokens.c.id == key).values(used_at=at, used_from=address)
        )


async def add_session(connection: AsyncConnection, **columns: Any) -> None:
    """Insert a session."""
    await connection.execute(insert(sessions).values(columns))


def session(id: str, now: datetime) -> Select[Any]:
    """A query for a session that is neither revoked nor expired."""
    return select(sessions).where(
        sessions.c.id == id, sessions.c.revoked_at.is_(None), sessions.c.expires_at > now
    )


def live_sessions(now: datetime, name: str | None, begins: str = "") -> Select[Any]:
    """A query for the sessions that are neither revoked nor expired, the newest first: of one
    person, or of all. `begins`: the beginning of the id.
    """
    query = (
        select(sessions)
        .where(sessions.c.revoked_at.is_(None), sessions.c.expires_at > now)
        .order_by(sessions.c.created_at.desc())
        .limit(MOST_SESSIONS)
    )
    query = query.where(sessions.c.id.startswith(begins, autoescape=True)) if begins else query
    return query.where(sessions.c.name == name) if name is not None else query


async def end_session(connection: AsyncConnection, id: str, now: datetime) -> None:
    """Revoke a session."""
    await connection.execute(update(sessions).where(sessions.c.id == id).values(revoked_at=now))


async def last_revoked(connection: AsyncConnection) -> tuple[datetime | None, datetime | None]:
    """When a token or link, and when a session, was last revoked."""
    newest = [
        select(func.max(table.c.revoked_at)).scalar_subquery() for table in (tokens, sessions)
    ]
    of_tokens, of_sessions = (await connection.execute(select(*newest))).one()
    return of_tokens, of_sessions


async def prune(connection: AsyncConnection, now: datetime) -> int:
    """Delete the sessions and links that have expired. Returns how many."""
    old_sessions = await connection.execute(delete(sessions).where(sessions.c.expires_at < now))
    old_links = await connection.execute(
        delete(tokens).where(tokens.c.kind == LINK, tokens.c.expires_at < now)
    )
    return old_sessions.rowcount + old_links.rowcount
