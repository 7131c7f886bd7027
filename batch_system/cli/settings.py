"""`batch config` and `batch migrate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from batch_system.cli.opening import FAILED, ask
from batch_system.cli.options import AsJson
from batch_system.errors import InvalidParameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batch_system.operations.system.results import Migration, UsedSettings
    from batch_system.verbs.following import Operations


def config(as_json: AsJson = False) -> None:
    """Show the settings as they are used, and where each one comes from.

    Secrets are shown as ***, and URLs without their passwords. Further keys in `.env` are named
    without their values: they are your own settings, or mistyped.
    """
    from batch_system import console

    used = ask(_used, needs_tasks=False)
    if as_json:
        console.show_json(used)
        return
    rows = [setting.model_dump() for setting in used.settings]
    console.show_fitted(rows, ["name", "source", "value"], [])
    if used.others:
        console.say()
        console.say(f"also in .env, and no settings of the service: {', '.join(used.others)}")


async def _used(operations: Operations) -> UsedSettings:
    from batch_system.operations.system.settings import used

    if not operations.is_here:
        raise InvalidParameters(
            "this shows the settings of a machine: call it there, without --url"
        )
    return used(operations.context.settings)


def migrate(
    to: Annotated[
        str | None,
        typer.Option(
            metavar="REVISION", help="Migrate only the tables of this revision, and no further."
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Change nothing, and say which processes may go on meanwhile; the exit code is 1 "
            "if a migration is due.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring the tables of both databases to the revisions of this code, and make the databases if
    they are missing.

    A service does the same when it starts. Processes of an older version may go on meanwhile, if
    they can work with the tables afterwards; otherwise the command is refused, and names them.
    """
    from batch_system import console
    from batch_system.operations.system import migrations

    if check and to is not None:
        raise InvalidParameters("--check changes nothing, so it has no use for --to: leave one out")

    async def work(operations: Operations) -> tuple[Sequence[Migration], Sequence[Migration]]:
        before = await migrations.list_migrations(operations.context)
        return before, before if check else await migrations.carry_out(operations.context, to)

    before, after = ask(work, needs_tasks=False)
    if as_json:
        console.show_json(list(after))
    else:
        console.show(
            [_row(*states) for states in zip(before, after, strict=True)],
            list(COLUMNS),
            as_json=False,
        )
        for state in after:
            if check and state.is_due and state.current is not None:
                console.say(_what_may_stay(state))
    raise SystemExit(FAILED if check and any(state.is_due for state in after) else 0)


COLUMNS = ("database", "table", "was", "is", "newest")


def _row(before: Migration, after: Migration) -> dict[str, Any]:
    return {
        "database": after.database,
        "table": after.version_table,
        "was": before.current or "none",
        "is": after.current or "none",
        "newest": after.newest,
    }


def _what_may_stay(state: Migration) -> str:
    """Which older processes may go on when the migration is carried out."""
    subject = f"{state.version_table}: "
    if state.expands:
        return f"{subject}expands: nodes from version {state.oldest_version} on may stay"
    if state.in_the_way:
        return f"{subject}contracts: kept back, stop first: {', '.join(state.in_the_way)}"
    return f"{subject}contracts: no older process may start or go on"
