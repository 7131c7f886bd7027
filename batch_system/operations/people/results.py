"""What is answered about people: tokens, sessions and the audit."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from batch_system.operations.asking.actor import Role
from batch_system.operations.asking.results import Result


class Token(Result):
    """A token, without its secret. `id`: its key, which stands in the secret too. `used_from`: an
    address.
    """

    id: str
    name: str
    role: Role
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    revoked_at: datetime | None
    revoked_by: str | None
    used_at: datetime | None
    used_from: str | None


class NewToken(Result):
    """A new token. `secret` is shown this once, and can't be read again."""

    id: str
    name: str
    role: Role
    expires_at: datetime | None
    secret: str

    def __repr__(self) -> str:
        return f"NewToken(id={self.id!r}, name={self.name!r}, role={self.role!r})"

    __str__ = __repr__


class NewSession(Result):
    """A session that somebody has begun. `secret` is the value of the cookie."""

    name: str
    role: Role
    expires_at: datetime
    secret: str

    def __repr__(self) -> str:
        return f"NewSession(name={self.name!r}, role={self.role!r})"

    __str__ = __repr__


class Session(Result):
    """A sign-in of a person that lasts. `id`: the beginning of the SHA-256 of its cookie. `token`:
    the id of the token or link with which it was begun.
    """

    id: str
    name: str
    role: Role
    token: str
    address: str | None
    created_at: datetime
    expires_at: datetime


class SessionList(Result):
    """The sessions that last, the newest first."""

    sessions: list[Session]


MOST_CHANGES = 200
MOST_COUNTED = 1_000


class Change(Result):
    """An event of the audit. `source`: api, cli, page or service.

    `before` and `after`: JSON values; of large ones the beginning, as text.
    """

    id: str
    at: datetime
    actor: str
    role: str | None
    source: str
    address: str | None
    action: str
    task: str | None
    run: str | None
    target: str | None
    before: Any
    after: Any
    note: str | None


ChangeKind = Literal["deploys", "settings", "runs", "pauses", "acknowledged", "access"]


class ChangeCount(Result):
    """How many changes of a kind a person or a program has made. `who`: None for the service."""

    who: str | None
    kind: ChangeKind
    number: int


class ChangeCounts(Result):
    """How many changes there are from a page on. `has_all`: whether all of them were counted, and
    not only the newest.
    """

    by: list[ChangeCount]
    has_all: bool


class ChangePage(Result):
    """A page of the audit, newest first. `after`: the cursor of the next page; None at the end.

    `counts`: None if they were not asked for.
    """

    changes: list[Change]
    after: str | None
    counts: ChangeCounts | None = None


class TokenList(Result):
    """All tokens, without their secrets."""

    tokens: list[Token]
