"""Access: tokens, and the audit, which says who changed what."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, StringConstraints

from batch_system import clock
from batch_system.operations.asking.actor import Role
from batch_system.operations.asking.sentences import Allowed
from batch_system.operations.people.results import (
    MOST_CHANGES,
    MOST_COUNTED,
    ChangePage,
    NewToken,
    Session,
    SessionList,
    Token,
    TokenList,
)
from batch_system.verbs.fields import Ahead, Cursor, Since, TaskName
from batch_system.verbs.verb import Verb, delete, get, post

if TYPE_CHECKING:
    from batch_system.operations.asking.context import Context

LONGEST_DAYS = 3_650


class ListChanges(Verb, role="viewer", http=get("/changes", tag="service")):
    """List the changes in the audit: who changed what, when and from where; the newest first, a
    page at a time.
    """

    since: Since | None = Field(None, description="Only changes at this instant or later.")
    until: Since | None = Field(None, description="Only changes before this instant.")
    task: TaskName | None = Field(None, description="Only changes about this task.")
    action: str | None = Field(
        None, pattern=r"^[a-z_.]{1,60}$", description="Only events such as `run.cancel`."
    )
    limit: int = Field(
        50, ge=1, le=MOST_CHANGES, description="How many changes the page has at most."
    )
    after: Cursor | None = None
    counts: bool = Field(
        False,
        description="Also count the changes by person and kind, from this page on; of more than "
        f"{MOST_COUNTED:,} the newest ones.",
    )

    async def perform(self, context: Context) -> ChangePage:
        from batch_system.operations.people import changes

        return await changes.list_changes(
            context,
            self.limit,
            self.after,
            self.since,
            self.until,
            self.task,
            self.action,
            with_counts=self.counts,
        )


class ListTokens(Verb, role="admin", http=get("/tokens")):
    """List the tokens, newest first, also those that are revoked or expired. No secret is shown."""

    async def perform(self, context: Context) -> TokenList:
        from batch_system.operations.people import access

        return TokenList(tokens=list(await access.list_tokens(context)))


class CreateToken(
    Verb,
    role="admin",
    http=post("/tokens", status=201),
    audit="token.create",
):
    """Make a token. Its secret is in this answer, and nowhere else."""

    name: Annotated[
        str,
        StringConstraints(
            min_length=1,
            max_length=100,
            pattern=r"^[A-Za-z0-9_.@+-]([A-Za-z0-9_ .@+-]*[A-Za-z0-9_.@+-])?$",
        ),
        Allowed("allowed are 1 to 100 letters from a to z, digits, spaces and _ . @ + -"),
    ] = Field(description="The name of the token: who uses it, and for what.")
    role: Role = Field(
        description="viewer (reads), operator (also changes runs and tasks), or admin (also "
        "manages tokens and backups)."
    )
    expires_in_days: int | None = Field(
        None, ge=1, le=LONGEST_DAYS, description="In how many days it expires. Default: never."
    )
    expires: Ahead | None = Field(None, description="When it expires. Default: never.")

    async def perform(self, context: Context) -> NewToken:
        from batch_system.operations.people import access

        valid_for = self.expires - clock.now() if self.expires is not None else None
        if self.expires_in_days is not None:
            valid_for = timedelta(days=self.expires_in_days)
        return await access.create_token(context, self.name, self.role, valid_for)


TokenName = Annotated[
    str, Field(min_length=1, max_length=100, description="The name or the id of the token.")
]


class RevokeToken(
    Verb,
    role="admin",
    http=delete("/tokens/{name}", revokes=True),
    audit="token.revoke",
):
    """Revoke a token, and end the sessions that were begun with it. Services refuse it within two
    seconds.
    """

    name: TokenName

    async def perform(self, context: Context) -> Token:
        from batch_system.operations.people import access

        return await access.revoke_token(context, self.name)


class ListSessions(Verb, role="viewer", http=get("/sessions", tag="tokens")):
    """List the sign-ins that last, the newest first: those of all people for an admin, else one's
    own.
    """

    async def perform(self, context: Context) -> SessionList:
        from batch_system.operations.people import access

        return SessionList(sessions=list(await access.list_sessions(context)))


class EndSession(
    Verb,
    role="viewer",
    http=delete("/sessions/{session}", tag="tokens", revokes=True),
    audit="session.end",
):
    """End a sign-in: of anybody for an admin, else one's own. Services refuse it within two
    seconds.
    """

    session: Annotated[
        str,
        StringConstraints(pattern=r"^[0-9a-f]{6,64}$"),
        Allowed("allowed: the id of a session, or at least its first six digits"),
    ] = Field(description="The id of the session, or at least its first six digits.")

    async def perform(self, context: Context) -> Session:
        from batch_system.operations.people import access

        return await access.end_other_session(context, self.session)
