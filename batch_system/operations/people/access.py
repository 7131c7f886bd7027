"""Access: tokens of programs, links that sign in once, and sessions of people.

A secret is 32 random bytes, so its SHA-256 is stored without a salt or a slow hash. It is never
stored itself, and appears in no error, log or event.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any

from sqlalchemy import Select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import database_time
from batch_system.batch.ledger.people import access, audit
from batch_system.errors import InvalidParameters, UnknownToken, WrongState
from batch_system.escaping import echoed
from batch_system.operations.asking.actor import ROLES, Actor, Role
from batch_system.operations.asking.context import Context
from batch_system.operations.people.results import NewSession, NewToken, Session, Token

LINK_TIME = timedelta(minutes=5)
SESSION_TIME = timedelta(hours=12)
LONGEST_VALIDITY = timedelta(days=3650)
SECRET = re.compile(r"b([tls])_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
SESSION_DIGITS = 12
"""The id of a session has this many digits where it is shown."""
NO_FAILURES: Mapping[str, int] = MappingProxyType({})
NAME = re.compile(r"[\w.@+-][\w .@+-]{0,98}[\w.@+-]|[\w.@+-]", re.ASCII)
RESERVED = ("anonymous", "batch", "service", "sign-in link")
"""Names that the audit uses for actors other than the holders of tokens."""


async def create_token(
    context: Context, name: str, role: str, valid_for: timedelta | None = None
) -> NewToken:
    """Make a token; `valid_for`: None for a token that does not expire.

    Raises InvalidParameters, and WrongState if there is a token of this name.
    """
    if not NAME.fullmatch(name):
        raise InvalidParameters(
            f"the name {echoed(name)} of the token: allowed are 1 to 100 letters from a to z, "
            "digits, spaces and _ . @ + -"
        )
    if name.lower() in RESERVED:
        raise InvalidParameters(
            f"the name {echoed(name)} of the token: the service itself has this name in the audit"
        )
    if role not in ROLES:
        raise InvalidParameters(f"there is no role {echoed(role)}; allowed: {', '.join(ROLES)}")
    if valid_for is not None and not timedelta(0) < valid_for <= LONGEST_VALIDITY:
        raise InvalidParameters(
            f"a token may be valid for more than zero and at most {LONGEST_VALIDITY.days:,} days"
        )
    async with context.databases.changing() as connection:
        made = await _add(context, connection, access.TOKEN, name, role, valid_for)
    if made is None:
        raise WrongState(
            f"there is a token named {echoed(name)} already: choose another name, or revoke it"
        )
    return made


async def create_link(context: Context, role: Role = "admin") -> str:
    """The secret of a link that signs in once, within five minutes."""
    async with context.databases.changing() as connection:
        made = await _add(context, connection, access.LINK, "sign-in link", role, LINK_TIME)
    assert made is not None
    return made.secret


async def has_token(context: Context) -> bool:
    """Whether a token was ever made, including those that are revoked or expired by now."""
    async with context.databases.reading() as connection:
        return connection is not None and await access.has_token(connection)


async def list_tokens(context: Context) -> Sequence[Token]:
    """All tokens, also those that are revoked or expired, the newest first."""
    async with context.databases.reading() as connection:
        return (
            [Token.of(row) for row in await access.listed(connection)]
            if connection is not None
            else []
        )


async def revoke_token(context: Context, name: str) -> Token:
    """Revoke a token, given by its name or id, and the sessions made with it. Raises
    UnknownToken.
    """
    async with context.databases.changing() as connection:
        now = await database_time.now_of(connection)
        key = await access.revoke(connection, name, context.actor.name, now)
        if key is None:
            raise UnknownToken(
                f"there is no valid token {echoed(name)}; `batch token list` lists the tokens"
            )
        token = next(Token.of(row) for row in await access.listed(connection) if row["id"] == key)
        await audit.record(connection, context.actor.by, "token.revoke", now, target=token.name)
    return token


async def holder(context: Context, secret: str, address: str | None) -> Actor | None:
    """Who holds this token; None if it is not valid. The caller records the use (see
    `note_uses`).
    """
    row = await _token(context, secret, "t")
    return Actor(row["name"], row["role"], "api", address, row["id"]) if row is not None else None


async def note_uses(
    context: Context,
    uses: Mapping[str, tuple[datetime, str | None]],
    failures: Mapping[str, int] = NO_FAILURES,
) -> None:
    """Record when and from where tokens were used last, by the ids of the tokens.

    `failures`: how many tokens that are not valid came from each address; they are an event of
    the audit.
    """
    if not uses and not failures:
        return
    async with context.databases.changing() as connection:
        await access.note_uses(connection, uses)
        if failures:
            now, after = await database_time.now_of(connection), dict(failures)
            await audit.record(connection, context.actor.by, "session.refuse", now, after=after)


async def sign_in(context: Context, secret: str, address: str | None) -> NewSession | None:
    """Begin a session with a token or a link, which is used up; None if it is not valid."""
    row = await _token(context, secret, "t") or await _token(context, secret, "l")
    if row is None:
        return None
    return await _begin_session(context, row["name"], row["role"], row["id"], row["kind"], address)


async def expired_at(context: Context, secret: str) -> datetime | None:
    """When this token expired; None if it never was valid, still is, or was revoked."""
    row = await _token(context, secret, "t", access.expired)
    return row["expires_at"] if row is not None else None


async def session(context: Context, secret: str, address: str | None) -> Actor | None:
    """Whose session this cookie belongs to; None if it is not valid any more."""
    match = SECRET.fullmatch(secret)
    if match is None or match[1] != "s":
        return None
    async with context.databases.reading() as connection:
        if connection is None:
            return None
        query = access.session(hash_of(secret), await database_time.now_of(connection))
        row = (await connection.execute(query)).mappings().first()
    if row is None:
        return None
    return Actor(row["name"], row["role"], "page", address, row["token"], row["expires_at"])


async def list_sessions(context: Context) -> Sequence[Session]:
    """The sessions that last, the newest first: of all people for an admin, else one's own."""
    async with context.databases.reading() as connection:
        if connection is None:
            return []
        now = await database_time.now_of(connection)
        query = access.live_sessions(now, _whose(context))
        return [_session(row) for row in (await connection.execute(query)).mappings()]


async def end_other_session(context: Context, begins: str) -> Session:
    """End the session whose id begins so: of anybody for an admin, else one's own. Raises
    UnknownToken.
    """
    async with context.databases.changing() as connection:
        now = await database_time.now_of(connection)
        query = access.live_sessions(now, _whose(context), begins)
        rows = (await connection.execute(query)).mappings().all()
        if len(rows) != 1:
            raise UnknownToken(f"there is no session {echoed(begins)} that lasts")
        await access.end_session(connection, rows[0]["id"], now)
        name = rows[0]["name"]
        await audit.record(connection, context.actor.by, "session.end", now, target=name)
    return _session(rows[0])


def _whose(context: Context) -> str | None:
    """The person whose sessions the caller may see; None: those of all."""
    return None if context.actor.role == "admin" else context.actor.name


def _session(row: Mapping[Any, Any]) -> Session:
    return Session.of({**row, "id": row["id"][:SESSION_DIGITS]})


async def sign_out(context: Context, secret: str) -> None:
    """End a session."""
    async with context.databases.changing() as connection:
        await access.end_session(
            connection, hash_of(secret), await database_time.now_of(connection)
        )


async def _token(
    context: Context,
    secret: str,
    kind: str,
    query: Callable[[str, datetime], Select[Any]] = access.token,
) -> Mapping[Any, Any] | None:
    match = SECRET.fullmatch(secret)
    if match is None or match[1] != kind:
        return None
    async with context.databases.reading() as connection:
        if connection is None:
            return None
        now = await database_time.now_of(connection)
        row = (await connection.execute(query(match[2], now))).mappings().first()
    return row if row is not None and hmac.compare_digest(row["hash"], hash_of(secret)) else None


async def _add(
    context: Context,
    connection: AsyncConnection,
    kind: str,
    name: str,
    role: str,
    valid_for: timedelta | None,
) -> NewToken | None:
    now = await database_time.now_of(connection)
    expires_at = now + valid_for if valid_for is not None else None
    key, secret = _new_secret("l" if kind == access.LINK else "t")
    is_new = await access.add_token(
        connection,
        id=key,
        name=name,
        kind=kind,
        role=role,
        hash=hash_of(secret),
        created_at=now,
        created_by=context.actor.name,
        expires_at=expires_at,
    )
    if not is_new:
        return None
    if kind == access.TOKEN:
        after = {"role": role, "expires_at": expires_at.isoformat() if expires_at else None}
        await audit.record(
            connection, context.actor.by, "token.create", now, target=name, after=after
        )
    return NewToken.of(
        {"id": key, "name": name, "role": role, "expires_at": expires_at, "secret": secret}
    )


async def _begin_session(
    context: Context, name: str, role: Role, token: str, kind: str, address: str | None
) -> NewSession | None:
    _, secret = _new_secret("s")
    async with context.databases.changing() as connection:
        now = await database_time.now_of(connection)
        if kind == access.LINK and not await access.take_link(connection, token, address, now):
            return None
        session = {"name": name, "role": role, "expires_at": now + SESSION_TIME}
        await access.add_session(
            connection,
            id=hash_of(secret),
            token=token,
            address=address,
            created_at=now,
            **session,
        )
        by = audit.By(name, "page", role, address)
        await audit.record(connection, by, "session.begin", now, target=name)
    return NewSession.of({**session, "secret": secret})


def hash_of(secret: str) -> str:
    """The SHA-256 of a secret, as hex digits."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _new_secret(kind: str) -> tuple[str, str]:
    """A key, and a secret that contains it."""
    key = secrets.token_hex(6)
    return key, f"b{kind}_{key}_{secrets.token_urlsafe(32)}"
