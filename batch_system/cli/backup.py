"""Commands about backups: `batch backup …`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batch_system.cli.confirming import confirm
from batch_system.cli.opening import ask, backups_of
from batch_system.cli.options import AsJson, first_of, within
from batch_system.escaping import brief

if TYPE_CHECKING:
    from batch_system.operations.backups.make import BackupResult
    from batch_system.operations.backups.results import BackupSummary
    from batch_system.settings.settings import Settings
    from batch_system.verbs.following import Operations

MOST_SHOWN, MOST_NAMED, LONGEST_SHOWN = 1_000, 20, 200
"""The most tables in a list, names in a line, and characters of a name. A file from elsewhere may
have any number.
"""

LOGGED = "WARNING"
"""The log level of these commands. They log, for example, that a record was not written to the
ledger.
"""

File = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="A path, a name, `latest`, or s3://bucket/prefix/name.",
        show_default=False,
    ),
]
FileOrLatest = Annotated[
    str,
    typer.Argument(metavar="FILE", help="A path, a name, `latest`, or s3://bucket/prefix/name."),
]


def create(as_json: AsJson = False) -> None:
    """Back up the application's database into BACKUP_DIR, and read the backup back to verify it.

    The command deletes no old backup, and copies nothing to BACKUP_URL. `batch run backup` does
    these things too.
    """
    with _progress("backup") as on_progress:
        backup = ask(lambda service: backups_of(service).create(on_progress), log_level=LOGGED)
    _print_result(backup, as_json, f"{backup.path}: {_counts(backup)}, verified (checksums only)")


def list_(
    rescan: Annotated[
        bool,
        typer.Option(
            "--rescan", help="Read every file, and rewrite the ledger's records of backups."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the backups in BACKUP_DIR and at BACKUP_URL, newest first.

    The column `check` has the last check of each backup. `checksums only` means that every byte is
    as it was written, and `restored` means that the rows were also loaded into a database.

    --rescan keeps the records of checks, deletes the records of backups whose files do not exist
    any more, and finds backups that were changed since they were made.
    """
    from batch_system import console

    async def work(operations: Operations) -> Sequence[BackupSummary]:
        if rescan:
            await backups_of(operations).rescan()
        if operations.is_here:
            return await backups_of(operations).list(_warn)
        from batch_system.verbs.backups import ListBackups

        answer = await operations(ListBackups())
        for warning in answer.warnings:
            _warn(warning)
        return answer.backups

    summaries = ask(work, log_level=LOGGED)
    if as_json:
        console.show_json(list(summaries))
    elif summaries:
        columns = ("backup", "check", "size", "rows", "migration", "kept", "where")
        console.show([_row(summary) for summary in summaries], columns, False)
    else:
        settings = _settings()
        elsewhere = " or at BACKUP_URL" if settings.BACKUP_URL else ""
        console.say(f"there is no backup in {settings.BACKUP_DIR}{elsewhere}")


def _row(summary: BackupSummary) -> dict[str, Any]:
    from batch_system.cli.meter import size

    return {
        "backup": summary.name,
        "size": size(summary.size),
        "rows": _number(summary.rows),
        "migration": summary.revision and brief(summary.revision),
        "check": summary.check,
        "kept": summary.kept,
        "where": summary.where,
    }


def show(file: File, as_json: AsJson = False) -> None:
    """Show the tables of a backup with their numbers of rows, and what the ledger has recorded
    about the backup.
    """
    from batch_system import console
    from batch_system.cli.meter import size

    details, tables = ask(lambda service: backups_of(service).show(file, _warn), log_level=LOGGED)
    values = details.model_dump(by_alias=True)
    if as_json:
        listed = [
            {
                "table": str(table),
                "rows": table.rows,
                "bytes": table.bytes,
                "columns": table.columns,
                "key": table.key,
            }
            for table in within(tables, lambda table: [str(table), *table.columns, *table.key])
        ]
        left_out = within(values["left out"], lambda name: [name])
        console.show_json(
            {
                **values,
                "left out": left_out,
                "tables": listed,
                "more tables": len(tables) - len(listed),
            }
        )
        return
    values |= {
        name: values[name] and brief(values[name], LONGEST_SHOWN)
        for name in ("of", "migration", "made by")
    }
    left_out = first_of([brief(name, LONGEST_SHOWN) for name in values["left out"]], MOST_NAMED)
    console.show_values(
        {
            **values,
            "size": size(values["size"]),
            "rows": _number(values["rows"]),
            "left out": left_out,
        }
    )
    console.heading("tables")
    rows = [
        {
            "table": brief(str(table), LONGEST_SHOWN),
            "rows": f"{table.rows:,}",
            "size": size(table.bytes or None),
        }
        for table in tables[:MOST_SHOWN]
    ]
    console.show(rows, ("table", "rows", "size"), False)
    if len(tables) > MOST_SHOWN:
        console.say(f"and {len(tables) - MOST_SHOWN:,} more tables")


def verify(
    file: FileOrLatest = "latest",
    restore: Annotated[
        bool,
        typer.Option(
            "--restore",
            help="Also restore the backup into a scratch database, and compare the rows.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read a whole backup, and compare every byte with its checksums.

    This does not prove that the rows can be loaded into a database; --restore proves it. The ledger
    records which check was made, and `batch backup list` shows it.
    """
    with _progress("verify") as on_progress:

        async def work(operations: Operations) -> BackupResult:
            verified = await backups_of(operations).verify(file, on_progress)
            if restore:
                for note in (
                    await backups_of(operations).verify_by_restoring(verified.path, on_progress)
                ).notes:
                    _warn(note)
            return verified

        verified = ask(work, log_level=LOGGED)
    check = "restored" if restore else "checksums only"
    _print_result(
        verified,
        as_json,
        f"{verified.path}: {_counts(verified)}, verified ({check})",
        verified=check,
    )


def upload(file: FileOrLatest = "latest", as_json: AsJson = False) -> None:
    """Verify a backup in BACKUP_DIR, copy it to BACKUP_URL, and compare the copy with it."""
    with _progress("upload") as on_progress:
        copied = ask(
            lambda service: backups_of(service).upload(file, on_progress), log_level=LOGGED
        )
    _print_result(copied, as_json, f"{copied.url}: {_counts(copied)}, compared with {copied.path}")


def download(file: FileOrLatest = "latest", as_json: AsJson = False) -> None:
    """Copy a backup from BACKUP_URL, or from the address FILE, into BACKUP_DIR, and verify the
    copy.
    """
    with _progress("download") as on_progress:
        copied = ask(
            lambda service: backups_of(service).download(file, on_progress), log_level=LOGGED
        )
    _print_result(copied, as_json, f"{copied.path}: {_counts(copied)}, verified (checksums only)")


def prune(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be deleted, and delete nothing.")
    ] = False,
    yes: Annotated[
        bool,
        typer.Option(
            "--yes", help="Delete also if this is more than half of the backups in a place."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete old backups in BACKUP_DIR and at BACKUP_URL, as the task `backup` does after each new
    backup.

    These backups are kept: the newest BACKUP_KEEP_LAST backups; those that are younger than
    BACKUP_RETENTION_DAYS; the newest one of each of the last BACKUP_KEEP_WEEKLY weeks and
    BACKUP_KEEP_MONTHLY months; pinned ones; and the last verified one.

    Nothing is deleted if the newest backup has failed its check, or has far fewer rows than the one
    before it. Without --yes, nothing is deleted in a place where more than half of the backups
    would be deleted.
    """
    from batch_system import console

    pruned = ask(
        lambda service: backups_of(service).prune(_warn, dry_run=dry_run, allow_many=yes),
        log_level=LOGGED,
    )
    if as_json or pruned:
        console.show(
            [row.model_dump(mode="json") for row in pruned],
            ("backup", "where", "then", "why"),
            as_json,
        )
    else:
        console.say(f"there is no backup in {_settings().BACKUP_DIR}")


def pin(file: FileOrLatest = "latest", as_json: AsJson = False) -> None:
    """Keep a backup at any age, until it is unpinned.

    The pin is a small file beside the backup. It is written in each place that has the backup.
    """
    change = ask(lambda service: backups_of(service).pin(file), log_level=LOGGED)
    state = "is pinned" if change.changed else "was pinned already"
    _print(f"{change.backup} {state}", as_json, change)


def unpin(file: File, as_json: AsJson = False) -> None:
    """Remove the pin of a backup, so that it can be deleted when it is old."""
    change = ask(lambda service: backups_of(service).unpin(file), log_level=LOGGED)
    state = "is not pinned any more" if change.changed else "was not pinned"
    _print(f"{change.backup} {state}", as_json, change)


def delete(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="The name of a backup, as `batch backup list` shows it."
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Delete it without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete a backup in each place where it is. A pinned backup is not deleted."""
    found = ask(lambda service: backups_of(service).find_to_delete(name), log_level=LOGGED)
    places = " and ".join(found.places)
    if not yes:
        confirm(f"Delete {found.backup} ({places})?", "nothing was deleted")
    deleted = ask(lambda service: backups_of(service).delete(name), log_level=LOGGED)
    _print(f"{deleted.backup} is deleted ({places})", as_json, deleted)


def _settings() -> Settings:
    from batch_system.settings.reading import get_settings

    return get_settings()


def _progress(work: str) -> Any:
    from batch_system.cli.meter import metered

    return metered(work)


def _warn(text: str) -> None:
    from batch_system import console

    console.warn(f"batch: {text}")


def _number(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _counts(result: BackupResult) -> str:
    from batch_system.cli.meter import counted, size

    return (
        f"{counted(result.facts.rows or 0, result.facts.tables or 0)} in {size(result.facts.size)}"
    )


def _print_result(result: BackupResult, as_json: bool, text: str, **more: Any) -> None:
    _print(
        text,
        as_json,
        {
            "backup": result.path,
            "url": result.url,
            **result.model_dump(mode="json")["facts"],
            **more,
        },
    )


def _print(text: str, as_json: bool, facts: Any) -> None:
    """Print the text, or with `as_json` the facts."""
    from batch_system import console

    if as_json:
        console.show_json(facts)
    else:
        console.say(text)
