"""Commands about backups: `batch backup …`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.opening import ask
from service.cli.options import AsJson, first_of, within
from service.escaping import brief

if TYPE_CHECKING:
    from service.config import Settings
    from service.operations.backups.catalogue import BackupSummary
    from service.operations.backups.make import BackupResult
    from service.operations.operations import Operations

MOST_SHOWN, MOST_NAMED, LONGEST_SHOWN = 1_000, 20, 200
"""Tables in a list, names in a line, and characters of a name: a file from elsewhere may have any number."""

LOGGED = "WARNING"
"""What these commands log: that a record was not written, say."""

File = Annotated[
    str,
    typer.Argument(metavar="FILE", help="A path, a name, `latest`, or s3://bucket/prefix/name.", show_default=False),
]
FileOrLatest = Annotated[
    str, typer.Argument(metavar="FILE", help="A path, a name, `latest`, or s3://bucket/prefix/name.")
]


def create(as_json: AsJson = False) -> None:
    """Back up the application's database into BACKUP_DIR, and read it back.

    Nothing is deleted, and nothing is copied elsewhere: `batch run backup` does all of that.
    """
    with _metered("backup") as tell:
        made = ask(lambda operations: operations.backups.create(tell), log_level=LOGGED)
    _tell_done(made, as_json, f"{made.path}: {_counts(made)}, verified (checksums only)")


def list_(
    rescan: Annotated[
        bool, typer.Option("--rescan", help="Read every file, and write the ledger's rows of backups anew.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the backups in BACKUP_DIR and at BACKUP_URL, the newest first.

    `restored` is proven to load; of `checksums only` every byte is as it was written. --rescan keeps what was done with
    a backup, forgets those whose files are gone, and finds those that were changed since they were made.
    """
    from service import console

    async def work(operations: Operations) -> Sequence[BackupSummary]:
        if rescan:
            await operations.backups.rescan()
        return await operations.backups.list(_warn)

    summaries = ask(work, log_level=LOGGED)
    if as_json:
        console.show_json([summary.model_dump() for summary in summaries])
    elif summaries:
        columns = ("backup", "check", "size", "rows", "migration", "kept", "where")
        console.show([_row(summary) for summary in summaries], columns, False)
    else:
        settings = _settings()
        elsewhere = " or at BACKUP_URL" if settings.BACKUP_URL else ""
        console.say(f"there is no backup in {settings.BACKUP_DIR}{elsewhere}")


def _row(summary: BackupSummary) -> dict[str, Any]:
    from service.cli.meter import size

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
    """Show what a backup holds, table by table, and what is known of it."""
    from service import console
    from service.cli.meter import size

    details, tables = ask(lambda operations: operations.backups.show(file, _warn), log_level=LOGGED)
    about = details.model_dump(by_alias=True)
    if as_json:
        told = [
            {"table": str(table), "rows": table.rows, "bytes": table.bytes, "columns": table.columns, "key": table.key}
            for table in within(tables, lambda table: [str(table), *table.columns, *table.key])
        ]
        left_out = within(about["left out"], lambda name: [name])
        console.show_json({**about, "left out": left_out, "tables": told, "more tables": len(tables) - len(told)})
        return
    about |= {name: about[name] and brief(about[name], LONGEST_SHOWN) for name in ("of", "migration", "made by")}
    left_out = first_of([brief(name, LONGEST_SHOWN) for name in about["left out"]], MOST_NAMED)
    console.show_values({**about, "size": size(about["size"]), "rows": _number(about["rows"]), "left out": left_out})
    console.heading("tables")
    rows = [
        {"table": brief(str(one), LONGEST_SHOWN), "rows": f"{one.rows:,}", "size": size(one.bytes or None)}
        for one in tables[:MOST_SHOWN]
    ]
    console.show(rows, ("table", "rows", "size"), False)
    if len(tables) > MOST_SHOWN:
        console.say(f"and {len(tables) - MOST_SHOWN:,} more tables")


def verify(
    file: FileOrLatest = "latest",
    restore: Annotated[
        bool, typer.Option("--restore", help="Also restore it into a scratch database, and compare what is there.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read a backup and compare every byte with its checksums.

    That can't prove that its rows load: only --restore does. Both are recorded, and `batch backup list` shows which.
    """
    with _metered("verify") as tell:

        async def work(operations: Operations) -> BackupResult:
            verified = await operations.backups.verify(file, tell)
            if restore:
                for note in (await operations.backups.verify_by_restoring(verified.path, tell)).notes:
                    _warn(note)
            return verified

        verified = ask(work, log_level=LOGGED)
    how = "restored" if restore else "checksums only"
    _tell_done(verified, as_json, f"{verified.path}: {_counts(verified)}, verified ({how})", verified=how)


def upload(file: FileOrLatest = "latest", as_json: AsJson = False) -> None:
    """Copy a backup of BACKUP_DIR to BACKUP_URL, and compare what arrived. It is verified first."""
    with _metered("upload") as tell:
        copied = ask(lambda operations: operations.backups.upload(file, tell), log_level=LOGGED)
    _tell_done(copied, as_json, f"{copied.url}: {_counts(copied)}, compared with {copied.path}")


def download(file: FileOrLatest = "latest", as_json: AsJson = False) -> None:
    """Copy a backup from BACKUP_URL, or from its own address, into BACKUP_DIR, and verify it."""
    with _metered("download") as tell:
        copied = ask(lambda operations: operations.backups.download(file, tell), log_level=LOGGED)
    _tell_done(copied, as_json, f"{copied.path}: {_counts(copied)}, verified (checksums only)")


def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would stay, and why.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Also where more than half of a place's backups go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete old backups in BACKUP_DIR and at BACKUP_URL, as the task `backup` does after each new one.

    The newest BACKUP_KEEP_LAST stay, what is younger than BACKUP_RETENTION_DAYS, the newest of so many weeks and months
    (BACKUP_KEEP_WEEKLY, BACKUP_KEEP_MONTHLY), what is pinned, and the last verified one. When the newest has failed its
    check, or has far fewer rows than the last one, nothing goes; and without --yes nothing where more than half would.
    """
    from service import console

    pruned = ask(lambda operations: operations.backups.prune(_warn, dry_run=dry_run, allow_many=yes), log_level=LOGGED)
    if as_json or pruned:
        console.show([row.model_dump() for row in pruned], ("backup", "where", "then", "why"), as_json)
    else:
        console.say(f"there is no backup in {_settings().BACKUP_DIR}")


def pin(file: FileOrLatest = "latest", as_json: AsJson = False) -> None:
    """Keep a backup until it is unpinned, however old. The pin is a small file beside it, in each place where it is."""
    change = ask(lambda operations: operations.backups.pin(file), log_level=LOGGED)
    is_now = "is pinned" if change.changed else "was pinned already"
    _tell(f"{change.backup} {is_now}", as_json, change.model_dump())


def unpin(file: File, as_json: AsJson = False) -> None:
    """Let a backup be deleted again when it is old."""
    change = ask(lambda operations: operations.backups.unpin(file), log_level=LOGGED)
    is_now = "is not pinned any more" if change.changed else "was not pinned"
    _tell(f"{change.backup} {is_now}", as_json, change.model_dump())


def _settings() -> Settings:
    from service.config import get_settings

    return get_settings()


def _metered(what: str) -> Any:
    from service.cli.meter import metered

    return metered(what)


def _warn(text: str) -> None:
    from service import console

    console.warn(f"batch: {text}")


def _number(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _counts(done: BackupResult) -> str:
    from service.cli.meter import counted, size

    return f"{counted(done.facts.rows or 0, done.facts.tables or 0)} in {size(done.facts.size)}"


def _tell_done(done: BackupResult, as_json: bool, text: str, **more: Any) -> None:
    _tell(text, as_json, {"backup": done.path, "url": done.url, **done.model_dump()["facts"], **more})


def _tell(text: str, as_json: bool, facts: dict[str, Any]) -> None:
    from service import console

    if as_json:
        console.show_json(facts)
    else:
        console.say(text)
