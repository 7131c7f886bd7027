"""batch_backups: what is known of each backup beside what its file says. A row is a name, wherever the file is.

Facts come from the file, and are written anew whenever it is read. What was done with it (verified, uploaded,
restored, pinned) is here only, so a lost ledger loses it. Each function is one statement: the database decides races.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import bindparam, delete, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.tables import backups

Row = dict[str, Any]

CHECKSUMS, RESTORED = "checksums", "restored"


@dataclass(frozen=True)
class Facts:
    """What a backup's file says, and where it was found. None where it was not read."""

    name: str
    taken_at: datetime
    kind: str | None = None
    database: str | None = None
    revision: str | None = None
    size: int | None = None
    rows: int | None = None
    tables: int | None = None
    taken_by_run: str | None = None


UNKNOWN: Row = dict.fromkeys(backups.c.keys())
"""A row of which nothing is known."""
FACTS = tuple(Facts.__dataclass_fields__)
_LATER = ("kind", "database", "revision", "size", "rows", "tables", "taken_by_run")
_WHERE = ("local", "uploaded_at", "url")

_UPSERT = text(
    f"INSERT INTO batch_backups ({', '.join(FACTS + _WHERE)}, created_at) "
    f"VALUES ({', '.join(f':{name}' for name in FACTS + _WHERE)}, :created_at) ON CONFLICT (name) DO UPDATE SET "
    + ", ".join(f"{name} = coalesce(excluded.{name}, batch_backups.{name})" for name in _LATER)
    + ", local = excluded.local OR batch_backups.local"
    + "".join(f", {name} = coalesce(batch_backups.{name}, excluded.{name})" for name in _WHERE[1:])
).bindparams(*(bindparam(name, type_=backups.c[name].type) for name in (*FACTS, *_WHERE, "created_at")))


async def record(
    connection: AsyncConnection, facts: Facts, at: datetime, *, local: bool = True, url: str | None = None
) -> None:
    """A backup that was made or found in the folder, at `url`, or both. What is known of it already stays."""
    where = {"local": local, "url": url, "uploaded_at": at if url else None}
    await connection.execute(_UPSERT, {**asdict(facts), **where, "created_at": at})


async def verified(connection: AsyncConnection, name: str, how: str, at: datetime) -> bool:
    """It is good. Once restored it stays "restored", as long as no check of it fails. False: no such row."""
    how_now = func.coalesce(func.nullif(backups.c.verified_how, CHECKSUMS), how)
    return await _change(connection, name, verified_at=at, verified_how=how_now, failed_at=None, failed_check=None)


async def failed(connection: AsyncConnection, name: str, why: str, at: datetime) -> bool:
    """It is not good, whatever was known before."""
    return await _change(connection, name, failed_at=at, failed_check=why, verified_at=None, verified_how=None)


async def uploaded(connection: AsyncConnection, name: str, url: str, at: datetime) -> bool:
    return await _change(connection, name, uploaded_at=at, url=url)


async def restored(connection: AsyncConnection, name: str, at: datetime) -> bool:
    """The application's database was restored from it."""
    return await _change(connection, name, restored_at=at)


async def pin(connection: AsyncConnection, name: str, by: str, at: datetime) -> bool:
    """It is never pruned. Who pinned it first stays. False: it is pinned already, or there is no such row."""
    return await _change(connection, name, only=backups.c.pinned_at.is_(None), pinned_at=at, pinned_by=by)


async def unpin(connection: AsyncConnection, name: str) -> bool:
    """False: it was not pinned, or there is no such row."""
    return await _change(connection, name, only=backups.c.pinned_at.is_not(None), pinned_at=None, pinned_by=None)


async def gone(connection: AsyncConnection, name: str, *, local: bool) -> None:
    """Its file is no more in the folder, or at the URL. A row whose file is nowhere goes too."""
    if local:
        await _change(connection, name, local=False)
    else:
        await _change(connection, name, uploaded_at=None, url=None)
    nowhere = backups.c.local.is_(False) & backups.c.uploaded_at.is_(None)
    await connection.execute(delete(backups).where(backups.c.name == name, nowhere))


async def keep_only(connection: AsyncConnection, names: Collection[str], before: datetime) -> int:
    """Drop the rows of other backups, which are in no place any more; returns how many.

    `before`: when the places were looked at. What was recorded since is of a newer file. What is pinned stays: a folder
    that is not mounted, or another BACKUP_DIR, has no files either, and a pin that is lost is found out too late.
    """
    old = (backups.c.created_at < before) & backups.c.pinned_at.is_(None)
    dropped = await connection.execute(delete(backups).where(backups.c.name.not_in(list(names)), old))
    return dropped.rowcount


async def get(connection: AsyncConnection, name: str) -> Row | None:
    row = (await connection.execute(select(backups).where(backups.c.name == name))).mappings().one_or_none()
    return dict(row) if row else None


async def listed(connection: AsyncConnection) -> Sequence[Row]:
    """All of them, the newest first."""
    found = await connection.execute(select(backups).order_by(backups.c.taken_at.desc(), backups.c.name.desc()))
    return [dict(row) for row in found.mappings()]


async def _change(connection: AsyncConnection, name: str, *, only: Any = None, **values: Any) -> bool:
    statement = update(backups).where(backups.c.name == name).values(values)
    if only is not None:
        statement = statement.where(only)
    return bool((await connection.execute(statement)).rowcount)


def state(row: Mapping[str, Any]) -> str:
    """For people: `restored`, `checksums`, `failed` or `not verified`."""
    if row["failed_at"] is not None:
        return "failed"
    return str(row["verified_how"] or "not verified")
