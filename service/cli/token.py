"""`batch token …`: makes, lists and revokes tokens, by which programs and people use the HTTP
API.
"""

from __future__ import annotations

from typing import Annotated

import typer

from service.cli.opening import ask
from service.cli.options import AsJson, age, utc

Name = Annotated[str, typer.Argument(help="The name of the token: who uses it, and for what.")]


def create(
    name: Name,
    role: Annotated[
        str,
        typer.Option(
            help="viewer (reads), operator (also changes runs and tasks), or admin (also manages "
            "tokens and backups)."
        ),
    ],
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="AGE",
            help="How long the token is valid, such as 12h or 90d; default: for ever.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a token, and print its secret.

    The secret is the only line on stdout. It is shown this once, and can't be read again.
    """
    from service import console
    from service.operations.people import access

    valid_for = age(expires, "--expires") if expires is not None else None
    token = ask(
        lambda operations: access.create_token(operations.context, name, role, valid_for),
        needs_tasks=False,
    )
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
    from service import console
    from service.verbs.access import ListTokens

    tokens = ask(lambda operations: operations(ListTokens()), needs_tasks=False)
    if as_json:
        console.show_json(list(tokens))
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


def revoke(
    name: Annotated[str, typer.Argument(help="The name or the id of the token.")],
    as_json: AsJson = False,
) -> None:
    """Revoke a token, and end the sessions that were begun with it. Services refuse it within two
    seconds.
    """
    from service import console
    from service.verbs.access import RevokeToken

    token = ask(lambda operations: operations(RevokeToken(name=name)), needs_tasks=False)
    if as_json:
        console.show_json(token)
    else:
        console.say(f"the token {token.name} is revoked")
