"""`batch backup restore`: shows what it will do, asks for confirmation, restores, and shows what it
has done.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batch_system.cli.backup import LOGGED
from batch_system.cli.opening import ask, backups_of
from batch_system.cli.options import AsJson
from batch_system.words import utc

if TYPE_CHECKING:
    from batch_system.backup.restoring.plan import RestorePlan
    from batch_system.operations.backups.restore import RestoreRequest, RestoreResult

FILE = typer.Argument(
    metavar="FILE", help="A path, a name, `latest`, or s3://bucket/prefix/name.", show_default=False
)


def restore(
    file: Annotated[str, FILE],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Restore, count the rows, and roll everything back.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Restore without asking for confirmation.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Restore even while a service is running, if it has no active run."
        ),
    ] = False,
    no_safety: Annotated[
        bool, typer.Option("--no-safety", help="Make no backup of the present rows.")
    ] = False,
    changed: Annotated[
        bool,
        typer.Option(
            "--changed",
            help="Restore even if the ledger shows that the backup was changed after it was made.",
        ),
    ] = False,
    into: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Restore into this other, empty database of the same kind."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replace the present rows of the application's database with the rows of a backup.

    The present rows are backed up first. The restore is one transaction, so it happens completely
    or not at all. Tables that are not in the backup are not changed.

    Stop the service before the restore. While a service is running, --force is needed. While a run
    is active, a restore is not possible. --dry-run and --into work at any time: they change nothing
    in the application's database.
    """
    from dataclasses import replace

    from batch_system.operations.backups.restore import RestoreRequest

    request = RestoreRequest(file, dry_run, force, not no_safety, changed, into)
    plan = ask(lambda service: backups_of(service).plan_restore(request), log_level=LOGGED)
    # After the answer, `latest` may be another backup.
    request = replace(request, backup=plan.backup)
    if not as_json:
        _print_plan(plan)
    if not (yes or dry_run or into is not None):
        _confirm(plan)
    result = _restore(request)
    if as_json:
        _print_json(result, plan)
    else:
        _print_result(result)


def _print_plan(plan: RestorePlan) -> None:
    from batch_system import console

    rows = sum(table.rows for table in plan.tables)
    console.show_values(
        {
            "backup": plan.backup,
            "taken": utc(plan.taken_at),
            "migration": plan.revision,
            "database": plan.database,
            "tables": f"{len(plan.tables):,}",
            "rows": f"{rows:,}, which replace {_present_rows(plan):,}",
        }
    )
    for note in plan.notes:
        console.say(f"note: {note}")


def _present_rows(plan: RestorePlan) -> int:
    """The number of rows that the database has now in the tables of the backup."""
    return sum(plan.rows.get(str(table), 0) for table in plan.tables)


def _confirm(plan: RestorePlan) -> None:
    """Let the user type the name of the database. Raises BackupError if there is no terminal, or
    for another name.
    """
    from batch_system import console
    from batch_system.errors import BackupError

    name = plan.name
    if not sys.stdin.isatty():
        raise BackupError(
            f"nothing was restored into {name}: stdin is no terminal, so --yes is needed to "
            "confirm it"
        )
    console.warn(f"Type the database's name ({name}) to replace its rows: ", end="")
    if sys.stdin.readline().strip() != name:
        raise BackupError(f"nothing was restored: the name that was typed is not {name}")


def _restore(request: RestoreRequest) -> RestoreResult:
    from batch_system.cli.meter import metered

    with metered("restore") as on_progress:
        return ask(
            lambda service: backups_of(service).restore(request, on_progress), log_level=LOGGED
        )


def _print_result(result: RestoreResult) -> None:
    from batch_system import console
    from batch_system.cli.meter import counted

    report = result.report
    if result.safety is not None:
        console.say(
            f"the rows from before the restore are in {result.safety}, which is `latest` now"
        )
    rows = [
        {
            "table": table.table,
            "before": "" if table.before is None else f"{table.before:,}",
            "after": f"{table.after:,}",
        }
        for table in report.tables
    ]
    console.show(rows, ("table", "before", "after"), False)
    outcome = "would be restored; everything was rolled back" if report.dry_run else "restored"
    console.say(f"{counted(report.rows, len(report.tables))} {outcome} ({report.seconds:.1f} s)")


def _print_json(result: RestoreResult, plan: RestorePlan) -> None:
    from dataclasses import asdict

    from batch_system import console

    report = result.report
    notes = [*plan.notes, *(note for note in report.notes if note not in plan.notes)]
    facts: dict[str, Any] = {
        **asdict(report),
        "safety": result.safety,
        "revision": plan.revision,
        "notes": notes,
    }
    console.show_json({**facts, "rows": report.rows})
