"""`batch backup restore`: says what it will do, asks, does it, and says what it did."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.backup import LOGGED
from service.cli.opening import ask
from service.cli.options import AsJson, utc

if TYPE_CHECKING:
    from service.backup.restoring.plan import RestorePlan
    from service.operations.backups.restore import RestoreRequest, RestoreResult

FILE = typer.Argument(metavar="FILE", help="A path, a name, `latest`, or s3://bucket/prefix/name.", show_default=False)


def restore(
    file: Annotated[str, FILE],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do it, count, and roll it back.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also while a service runs, if it is idle.")] = False,
    no_safety: Annotated[bool, typer.Option("--no-safety", help="Make no backup of what is there before.")] = False,
    changed: Annotated[
        bool,
        typer.Option("--changed", help="Also a backup that was changed since it was made, as the ledger knows it."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Put a backup's rows in place of those that the application's database has now.

    What is there is backed up first. The restore is one transaction: it happens as a whole or not at all. Tables that
    are not in the backup stay as they are. Stop the service before: while one runs, it needs --force, and while a run
    is active there is none.
    """
    from dataclasses import replace

    from service.operations.backups.restore import RestoreRequest

    request = RestoreRequest(file, dry_run, force, not no_safety, changed)
    plan = ask(lambda operations: operations.backups.plan_restore(request), log_level=LOGGED)
    request = replace(request, backup=plan.backup)  # `latest` may be another one by the time that somebody has answered
    if not as_json:
        _say(plan)
    if not (yes or dry_run):
        _ask(plan)
    done = _done(request)
    if as_json:
        _as_json(done, plan)
    else:
        _tell(done)


def _say(plan: RestorePlan) -> None:
    from service import console

    rows = sum(table.rows for table in plan.tables)
    console.show_values(
        {
            "backup": plan.backup,
            "taken": utc(plan.taken_at),
            "migration": plan.revision,
            "into": plan.database,
            "tables": f"{len(plan.tables):,}",
            "rows": f"{rows:,} in place of {sum(_now(plan).values()):,}",
        }
    )
    for note in plan.notes:
        console.say(f"note: {note}")


def _now(plan: RestorePlan) -> dict[str, int]:
    return {str(table): plan.rows[str(table)] for table in plan.tables if str(table) in plan.rows}


def _ask(plan: RestorePlan) -> None:
    """The database's name has to be typed, where somebody can."""
    from service import console
    from service.errors import BackupError

    name = plan.name
    if not sys.stdin.isatty():
        raise BackupError(f"nothing was restored into {name}: nobody can be asked here, so --yes has to say it")
    console.warn(f"Type the database's name ({name}) to replace its rows: ", end="")
    if sys.stdin.readline().strip() != name:
        raise BackupError("that is not its name: nothing was restored")


def _done(request: RestoreRequest) -> RestoreResult:
    from service.cli.meter import metered

    with metered("restore") as tell:
        return ask(lambda operations: operations.backups.restore(request, tell), log_level=LOGGED)


def _tell(done: RestoreResult) -> None:
    from service import console
    from service.cli.meter import counted

    report = done.report
    if done.safety is not None:
        console.say(f"what was there is in {done.safety}, which is `latest` by now")
    rows = [
        {"table": one.table, "before": "" if one.before is None else f"{one.before:,}", "after": f"{one.after:,}"}
        for one in report.tables
    ]
    console.show(rows, ("table", "before", "after"), False)
    would = "would be restored; all was rolled back" if report.dry_run else "restored"
    console.say(f"{counted(report.rows, len(report.tables))} {would} ({report.seconds:.1f} s)")


def _as_json(done: RestoreResult, plan: RestorePlan) -> None:
    from dataclasses import asdict

    from service import console

    facts: dict[str, Any] = {**asdict(done.report), "safety": done.safety, "revision": plan.revision}
    console.show_json({**facts, "rows": done.report.rows})
