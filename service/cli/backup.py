"""Commands about backups: `batch backup …`."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.options import AsJson, user, wait_for
from service.errors import BackupError

if TYPE_CHECKING:
    from service.config import Settings
    from service.discarding import Plan
    from service.keeping import Done, Tell

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
    from service import keeping

    with _metered("backup") as tell:
        done = _waited(keeping.create(_settings(), tell))
    _tell_done(done, as_json, f"{done.path}: {_counts(done)}, verified (checksums only)")


def list_(
    rescan: Annotated[
        bool, typer.Option("--rescan", help="Read every file, and write the ledger's rows of backups anew.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the backups in BACKUP_DIR and at BACKUP_URL, the newest first.

    `restored` is proven to load; of `checksums only` every byte is as it was written. --rescan keeps what was done with
    a backup (verified, pinned), and forgets those whose files are gone, but no pin.
    """
    from service import console, finding
    from service.cli.meter import size

    if rescan:
        _waited(finding.rescan(_settings()))
    rows = _waited(finding.listed(_settings(), _warn))
    if as_json:
        console.show_json(rows)
        return
    columns = ("backup", "check", "size", "rows", "migration", "kept", "where")
    shown = [
        {
            "backup": row["name"],
            "size": size(row["size"]),
            "rows": _number(row["rows"]),
            "migration": row["revision"],
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
    from service import console, finding
    from service.cli.meter import size

    about, tables = _waited(finding.shown(_settings(), file, _warn))
    if as_json:
        told = [
            {"table": str(table), "rows": table.rows, "bytes": table.bytes, "columns": table.columns, "key": table.key}
            for table in tables
        ]
        console.show_json({**about, "tables": told})
        return
    console.show_values({**about, "size": size(about["size"]), "rows": _number(about["rows"])})
    console.heading("tables")
    rows = [{"table": str(one), "rows": f"{one.rows:,}", "size": size(one.bytes or None)} for one in tables]
    console.show(rows, ("table", "rows", "size"), False)


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


async def _checked(file: str, restore: bool, tell: Tell) -> Done:
    from service import keeping, restoring

    done = await keeping.check(_settings(), file, tell)
    if restore:
        for note in (await restoring.check_by_restoring(_settings(), done.path, tell)).notes:
            _warn(note)
    return done


def upload(file: FileOrLatest = "latest", as_json: AsJson = False) -> None:
    """Copy a backup of BACKUP_DIR to BACKUP_URL, and compare what arrived. It is verified first."""

    with _metered("upload") as tell:
        done = _waited(_checked_and_uploaded(file, tell))
    _tell_done(done, as_json, f"{done.url}: {_counts(done)}, compared with {done.path}")


async def _checked_and_uploaded(file: str, tell: Tell) -> Done:
    from service import copying, keeping

    settings = _settings()
    done = await keeping.check(settings, file, tell)
    if keeping.own_name(settings, done.path) is None:
        raise BackupError(f"{done.path} is not in BACKUP_DIR: move it there first")
    return await copying.upload(settings, done.facts.name, tell)


def download(file: FileOrLatest = "latest", as_json: AsJson = False) -> None:
    """Copy a backup from BACKUP_URL, or from its own address, into BACKUP_DIR, and verify it."""
    from service import copying

    with _metered("download") as tell:
        done = _waited(copying.download(_settings(), file, tell))
    _tell_done(done, as_json, f"{done.path}: {_counts(done)}, verified (checksums only)")


def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would stay, and why.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete old backups in BACKUP_DIR and at BACKUP_URL, as the task `backup` does after each new one.

    What is younger than BACKUP_RETENTION_DAYS stays, and the newest of so many weeks and months (BACKUP_KEEP_WEEKLY,
    BACKUP_KEEP_MONTHLY), what is pinned, and the last verified one. When the newest has failed its check, or has far
    fewer rows than the last one, nothing goes.
    """
    from service import console, discarding

    settings = _settings()
    plans = _waited(discarding.plans(settings))
    for doubt in dict.fromkeys(plan.decision.doubt for plan in plans if plan.decision.doubt):
        _warn(f"nothing is deleted: {doubt}")
    gone = set() if dry_run else _waited(_pruned(settings, plans))
    rows = [row for plan in plans for row in _verdicts(plan, gone, dry_run)]
    if as_json:
        console.show_json(rows)
    elif rows:
        console.show(rows, ("backup", "where", "then", "why"), False)
    else:
        console.say(f"there is no backup in {settings.BACKUP_DIR}")


async def _pruned(settings: Settings, plans: list[Plan]) -> set[str]:
    from service import discarding

    return {one async for one in discarding.prune(settings, plans)}


def _verdicts(plan: Plan, gone: set[str], dry_run: bool) -> list[dict[str, Any]]:
    where = "folder" if plan.is_local else "elsewhere"
    rows = []
    for one in plan.decision.verdicts:
        goes = not one.stays and (dry_run or f"{plan.storage.name}/{one.name}" in gone)
        then = ("would go" if dry_run else "deleted") if goes else "stays"
        why = "pinned meanwhile" if not goes and not one.stays else one.why
        rows.append({"backup": one.name, "where": where, "then": then, "why": why})
    return rows


def pin(file: FileOrLatest = "latest", as_json: AsJson = False) -> None:
    """Keep a backup until it is unpinned, however old. The ledger knows of it, and its file does not."""
    from service import keeping

    name, is_new = _waited(keeping.pin(_settings(), file, user()))
    _tell(f"{name} is pinned" if is_new else f"{name} was pinned already", as_json, {"backup": name, "changed": is_new})


def unpin(file: File, as_json: AsJson = False) -> None:
    """Let a backup be deleted again when it is old."""
    from service import keeping

    name, was = _waited(keeping.unpin(_settings(), file))
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


def _counts(done: Done) -> str:
    from service.cli.meter import counted, size

    return f"{counted(done.facts.rows or 0, done.facts.tables or 0)} in {size(done.facts.size)}"


def _tell_done(done: Done, as_json: bool, text: str, **more: Any) -> None:
    _tell(text, as_json, {"backup": done.path, "url": done.url, **asdict(done.facts), **more})


def _tell(text: str, as_json: bool, facts: dict[str, Any]) -> None:
    from service import console

    if as_json:
        console.show_json(facts)
    else:
        console.say(text)
