"""batch_backups: what is known of each backup beside what its file says. A row is a name in a place.

Facts come from the file, and are written anew whenever it is read. What was done with it (verified, restored), and what
its manifest hashed to when we made it, is here only, so a lost ledger loses it. Each function is one statement: the
database decides races.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import bindparam, delete, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger.tables import backups

Row = dict[str, Any]

CHECKSUMS, RESTORED = "checksums", "restored"


@dataclass(frozen=True)
class Facts:
    """What a backup's file says. None where it was not read. `manifest`: the SHA-256 of its packed manifest."""

    name: str
    taken_at: datetime
    kind: str | None = None
    database: str | None = None
    revision: str | None = None
    size: int | None = None
    rows: int | None = None
    tables: int | None = None
    taken_by_run: str | None = None
    manifest: str | None = None


UNKNOWN: Row = dict.fromkeys(backups.c.keys())
"""A row of which nothing is known."""
FACTS = tuple(Facts.__dataclass_fields__)
_LATER = ("kind", "database", "revision", "size", "rows", "tables", "taken_by_run", "manifest")
_CHECKED = ("verified_at", "verified_how", "failed_at", "failed_check", "restored_at")
_VALUES = {name: f":{name}" for name in (*FACTS, "place", "created_at")}
_VALUES["manifest"] = "coalesce(:manifest, (SELECT max(manifest) FROM batch_backups AS other WHERE other.name = :name))"

_UPSERT = text(
    f"INSERT INTO batch_backups ({', '.join(_VALUES)}) VALUES ({', '.join(_VALUES.values())}) "
    "ON CONFLICT (name, place) DO UPDATE SET "
    + ", ".join(f"{name} = coalesce(excluded.{name}, batch_backups.{name})" for name in _LATER)
    + "".join(
        f", {n} = CASE WHEN excluded.size <> batch_backups.size THEN NULL ELSE batch_backups.{n} END" for n in _CHECKED
    )
).bindparams(*(bindparam(name, type_=backups.c[name].type) for name in _VALUES))


async def record(connection: AsyncConnection, facts: Facts, place: str, at: datetime, *, is_new: bool = False) -> None:
    """A backup that was found in a place. What is known of it there stays, unless it is a file of another size by now.

    `is_new`: we have just made it, so what its manifest hashes to is what it has to be, wherever it is copied.
    """
    manifest = facts.manifest if is_new else None
    await connection.execute(_UPSERT, {**asdict(facts), "manifest": manifest, "place": place, "created_at": at})


async def manifests(connection: AsyncConnection, name: str) -> Sequence[str]:
    """What the manifest of a backup of this name hashed to when we made it. Nothing: we did not, or nobody knows."""
    made = select(backups.c.manifest).where(backups.c.name == name, backups.c.manifest.is_not(None))
    return (await connection.execute(made)).scalars().all()


async def verified(connection: AsyncConnection, name: str, place: str, how: str, at: datetime) -> bool:
    """It is good. Once restored it stays "restored", as long as no check of it fails. False: no such row."""
    how_now = func.coalesce(func.nullif(backups.c.verified_how, CHECKSUMS), how)
    return await _change(
        connection, name, place, verified_at=at, verified_how=how_now, failed_at=None, failed_check=None
    )


async def failed(connection: AsyncConnection, name: str, place: str, why: str, at: datetime) -> bool:
    """It is not good, whatever was known before."""
    return await _change(connection, name, place, failed_at=at, failed_check=why, verified_at=None, verified_how=None)


async def restored(connection: AsyncConnection, name: str, place: str, at: datetime) -> bool:
    """The application's database was restored from it."""
    return await _change(connection, name, place, restored_at=at)


async def pins(connection: AsyncConnection) -> Sequence[Row]:
    """Pins of an older version, which kept them here: they still have to be written beside their files."""
    return await _rows(connection, backups.c.pinned_at.is_not(None))


async def pin_written(connection: AsyncConnection, name: str, place: str) -> bool:
    """The pin stands beside the file now, and there alone."""
    return await _change(connection, name, place, pinned_at=None, pinned_by=None)


async def unpin(connection: AsyncConnection, name: str) -> bool:
    """Drop what an older version has pinned. False: nothing was."""
    pinned = (backups.c.name == name) & backups.c.pinned_at.is_not(None)
    changed = await connection.execute(update(backups).where(pinned).values(pinned_at=None, pinned_by=None))
    return bool(changed.rowcount)


async def gone(connection: AsyncConnection, name: str, place: str) -> None:
    """Its file is no more in that place."""
    await connection.execute(delete(backups).where(backups.c.name == name, backups.c.place == place))


async def keep_only(connection: AsyncConnection, place: str, names: Collection[str], before: datetime) -> int:
    """Drop the rows of other backups, which are not in this place any more; returns how many.

    `before`: when the place was looked at. What was recorded since is of a newer file. What an older version has pinned
    stays: a folder that is not mounted has no files either, and a pin that is lost is found out too late.
    """
    old = (backups.c.place == place) & (backups.c.created_at < before) & backups.c.pinned_at.is_(None)
    dropped = await connection.execute(delete(backups).where(backups.c.name.not_in(list(names)), old))
    return dropped.rowcount


async def get(connection: AsyncConnection, name: str, place: str) -> Row | None:
    found = await _rows(connection, backups.c.name == name, backups.c.place == place)
    return found[0] if found else None


async def listed(connection: AsyncConnection) -> Sequence[Row]:
    """All of them, the newest first."""
    return await _rows(connection)


async def _rows(connection: AsyncConnection, *conditions: Any) -> list[Row]:
    order = (backups.c.taken_at.desc(), backups.c.name.desc(), backups.c.place)
    found = await connection.execute(select(backups).where(*conditions).order_by(*order))
    return [dict(row) for row in found.mappings()]


async def _change(connection: AsyncConnection, name: str, place: str, **values: Any) -> bool:
    of_it = (backups.c.name == name) & (backups.c.place == place)
    return bool((await connection.execute(update(backups).where(of_it).values(values))).rowcount)


def state(row: Mapping[str, Any]) -> str:
    """For people: `restored`, `checksums`, `failed` or `not verified`."""
    if row["failed_at"] is not None:
        return "failed"
    return str(row["verified_how"] or "not verified")
