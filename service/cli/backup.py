"""Commands about backups: `batch backup …`."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.options import AsJson, first_of, user, wait_for, within
from service.escaping import brief

if TYPE_CHECKING:
    from service.config import Settings
    from service.operations.backups.make import BackupResult, Tell
    from service.operations.backups.prune import Plan

MOST_SHOWN, MOST_NAMED, LONGEST_SHOWN = 1_000, 20, 200
"""Tables in a list, names in a line, and characters of a name: a file from elsewhere may have any number."""

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
    from service.operations.backups import make

    with _metered("backup") as tell:
        done = _waited(make.create(_settings(), tell))
    _tell_done(done, as_json, f"{done.path}: {_counts(done)}, verified (checksums only)")


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
    from service.cli.meter import size
    from service.operations.backups import catalogue

    if rescan:
        _waited(catalogue.rescan(_settings()))
    rows = _waited(catalogue.listed(_settings(), _warn))
    if as_json:
        console.show_json(rows)
        return
    columns = ("backup", "check", "size", "rows", "migration", "kept", "where")
    shown = [
        {
            "backup": row["name"],
            "size": size(row["size"]),
            "rows": _number(row["rows"]),
            "migration": row["revision"] and brief(row["revision"]),
            "check": row["check"],
            "kept": row["kept"],
            "where": row["where"],
        }
        for row in rows
    ]
    if shown:
        console.show(shown, columns, False)
    else:
        settings = _settings()
        elsewhere = " or at BACKUP_URL" if settings.BACKUP_URL else ""
        console.say(f"there is no backup in {settings.BACKUP_DIR}{elsewhere}")


def show(file: File, as_json: AsJson = False) -> None:
    """Show what a backup holds, table by table, and what is known of it."""
    from service import console
    from service.cli.meter import size
    from service.operations.backups import catalogue

    about, tables = _waited(catalogue.describe_backup(_settings(), file, _warn))
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
        done = _waited(_checked(file, restore, tell))
    told = "restored" if restore else "checksums only"
    _tell_done(done, as_json, f"{done.path}: {_counts(done)}, verified ({told})", verified=told)


async def _checked(file: str, restore: bool, tell: Tell) -> BackupResult:
    from service.operations.backups import make
    from service.operations.backups import restore as restoring

    done = await make.check(_settings(), file, tell)
    if restore:
        for note in (await restoring.check_by_restoring(_settings(), done.path, tell)).notes:
            _warn(note)
    return done


def upload(file: FileOrLatest = "latest", as_json: AsJson = False) -> None:
    """Copy a backup of BACKUP_DIR to BACKUP_URL, and compare what arrived. It is verified first."""
    from service.operations.backups import copies

    with _metered("upload") as tell:
        done = _waited(copies.upload(_settings(), file, tell))
    _tell_done(done, as_json, f"{done.url}: {_counts(done)}, compared with {done.path}")


def download(file: FileOrLatest = "latest", as_json: AsJson = False) -> None:
    """Copy a backup from BACKUP_URL, or from its own address, into BACKUP_DIR, and verify it."""
    from service.operations.backups import copies

    with _metered("download") as tell:
        done = _waited(copies.download(_settings(), file, tell))
    _tell_done(done, as_json, f"{done.path}: {_counts(done)}, verified (checksums only)")


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
    from service.operations.backups import prune as discarding

    settings = _settings()
    plans = _waited(discarding.plans(settings))
    for warning in discarding.warnings(plans, is_meant=yes):
        _warn(warning)
    gone = set() if dry_run else _waited(_pruned(settings, plans, yes))
    rows = [row for plan in plans for row in _verdicts(plan, gone, dry_run, yes)]
    if as_json:
        console.show_json(rows)
    elif rows:
        console.show(rows, ("backup", "where", "then", "why"), False)
    else:
        console.say(f"there is no backup in {settings.BACKUP_DIR}")


async def _pruned(settings: Settings, plans: list[Plan], yes: bool) -> set[str]:
    from service.operations.backups import prune as discarding

    return {one async for one in discarding.prune(settings, plans, is_meant=yes)}


def _verdicts(plan: Plan, gone: set[str], dry_run: bool, yes: bool) -> list[dict[str, Any]]:
    from service.backup.places.place import FOLDER

    where = "folder" if plan.storage.place == FOLDER else "elsewhere"
    is_held = plan.decision.too_many and not yes
    rows = []
    for one in plan.decision.verdicts:
        goes = not one.stays and not is_held and (dry_run or f"{plan.storage.name}/{one.name}" in gone)
        then = ("would go" if dry_run else "deleted") if goes else "stays"
        why = ("more than half would go" if is_held else "pinned meanwhile") if not goes and not one.stays else one.why
        rows.append({"backup": one.name, "where": where, "then": then, "why": why})
    return rows


def pin(file: FileOrLatest = "latest", as_json: AsJson = False) -> None:
    """Keep a backup until it is unpinned, however old. The pin is a small file beside it, in each place where it is."""
    from service.operations.backups import pins

    name, is_new = _waited(pins.pin(_settings(), file, user()))
    _tell(f"{name} is pinned" if is_new else f"{name} was pinned already", as_json, {"backup": name, "changed": is_new})


def unpin(file: File, as_json: AsJson = False) -> None:
    """Let a backup be deleted again when it is old."""
    from service.operations.backups import pins

    name, was = _waited(pins.unpin(_settings(), file))
    _tell(
        f"{name} is not pinned any more" if was else f"{name} was not pinned", as_json, {"backup": name, "changed": was}
    )


def _settings() -> Settings:
    from service.config import get_settings

    return get_settings()


def _waited(work: Coroutine[Any, Any, Any]) -> Any:
    from service import logs

    logs.set_up("WARNING")
    return wait_for(work)


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
    _tell(text, as_json, {"backup": done.path, "url": done.url, **asdict(done.facts), **more})


def _tell(text: str, as_json: bool, facts: dict[str, Any]) -> None:
    from service import console

    if as_json:
        console.show_json(facts)
    else:
        console.say(text)
