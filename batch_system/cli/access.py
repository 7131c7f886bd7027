"""`batch token …` and `batch changes`: who may use the service, and who has changed what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batch_system.cli.asked import asks
from batch_system.cli.opening import ask, pages
from batch_system.cli.options import AsJson, Limit
from batch_system.words import short, utc

if TYPE_CHECKING:
    from batch_system.operations.people.results import Change
    from batch_system.verbs.access import CreateToken, EndSession, ListChanges, RevokeToken


@asks(
    "asked",
    "batch_system.verbs.access:CreateToken",
    names={"name": "NAME", "expires": "--expires"},
    without=("expires_in_days",),
)
def create(asked: CreateToken, as_json: AsJson = False) -> None:
    """Make a token, and print its secret.

    The secret is the only line on stdout. It is shown this once, and can't be read again.
    """
    from batch_system import console

    token = ask(lambda operations: operations(asked), needs_tasks=False)
    if as_json:
        console.show_json(token)
        return
    validity = f"until {utc(token.expires_at)}" if token.expires_at else "until it is revoked"
    console.warn(
        f"the token {token.name} has the role {token.role}, and is valid {validity}. Its secret:"
    )
    console.say(token.secret)


def list_(as_json: AsJson = False) -> None:
    """List the tokens, newest first, also those that are revoked or expired. No secret is shown."""
    from batch_system import console
    from batch_system.verbs.access import ListTokens

    tokens = ask(lambda operations: operations(ListTokens()), needs_tasks=False).tokens
    if as_json:
        console.show_json(tokens)
    elif tokens:
        rows = [token.model_dump() for token in tokens]
        columns = [
            "name",
            "role",
            "id",
            "created_at",
            "created_by",
            "expires_at",
            "used_at",
            "used_from",
            "revoked_at",
        ]
        console.show(rows, columns, as_json=False)
    else:
        console.warn("batch: there is no token")


@asks("asked", "batch_system.verbs.access:RevokeToken", names={"name": "NAME"})
def revoke(asked: RevokeToken, as_json: AsJson = False) -> None:
    """Revoke a token, and end the sessions that were begun with it. Services refuse it within two
    seconds.
    """
    from batch_system import console

    token = ask(lambda operations: operations(asked), needs_tasks=False)
    if as_json:
        console.show_json(token)
    else:
        console.say(f"the token {token.name} is revoked")


def sessions(as_json: AsJson = False) -> None:
    """List the sign-ins of people that last, the newest first."""
    from batch_system import console
    from batch_system.verbs.access import ListSessions

    listed = ask(lambda operations: operations(ListSessions()), needs_tasks=False).sessions
    if as_json:
        console.show_json(listed)
    elif listed:
        columns = ["id", "name", "role", "address", "created_at", "expires_at"]
        console.show([each.model_dump() for each in listed], columns, as_json=False)
    else:
        console.warn("batch: nobody is signed in")


@asks("asked", "batch_system.verbs.access:EndSession", names={"session": "SESSION"})
def end_session(asked: EndSession, as_json: AsJson = False) -> None:
    """End a sign-in, as `batch token sessions` lists it."""
    from batch_system import console

    ended = ask(lambda operations: operations(asked), needs_tasks=False)
    if as_json:
        console.show_json(ended)
    else:
        console.say(f"the session {ended.id} of {ended.name} has ended")


COLUMNS = ["at", "actor", "source", "action", "task", "run", "target", "note"]


@asks("asked", "batch_system.verbs.access:ListChanges", without=("limit", "after"))
def changes(asked: ListChanges, limit: Limit = 50, as_json: AsJson = False) -> None:
    """Show who has changed what, when, and from where, newest first.

    With --json, each change also has the address, the role, and what was changed. With --counts,
    only how many there are by person and kind is shown.
    """
    from batch_system import console

    if asked.counts:
        _count(asked, as_json)
        return
    found = ask(lambda operations: pages(operations, asked, limit), needs_tasks=False)
    listed: list[Change] = [change for page in found for change in page.changes]
    if as_json:
        console.show_json(listed)
    elif listed:
        console.show_fitted(
            [_row(change) for change in listed], COLUMNS, ["source", "target", "run", "note"]
        )
    else:
        console.warn("batch: no changes match")


def _count(asked: ListChanges, as_json: bool) -> None:
    from batch_system import console

    one = asked.model_copy(update={"limit": 1})
    counts = ask(lambda operations: operations(one), needs_tasks=False).counts
    if as_json:
        console.show_json(counts)
    elif counts is None or not counts.by:
        console.warn("batch: no changes match")
    else:
        rows = [{**each.model_dump(), "who": each.who or "the service"} for each in counts.by]
        console.show(rows, ["who", "kind", "number"], as_json=False)
        if not counts.has_all:
            console.say("these are the newest changes; there are more")


def _row(change: Change) -> dict[str, Any]:
    return {**change.model_dump(), "run": change.run and short(change.run)}
