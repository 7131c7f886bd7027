"""Queries on batch_backups: what is known of each backup. Each row is about one backup (its name)
in one place.

Facts are read from the file of the backup, and written again each time it is read. When the backup
was verified or restored, and the hash that its manifest had when it was made, is stored only here,
so it is lost with the ledger. Each function is one statement, so the database decides races.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger.tables import backups
from batch_system.database import sql

Row = dict[str, Any]

CHECKSUMS, RESTORED = "checksums", "restored"


@dataclass(frozen=True)
class Facts:
    """What the file of a backup says about it. None: not read from the file, or not known.

    `taken_at`: aware. `size`: in bytes. `rows`, `tables`: how many. `manifest`: the SHA-256 of the
    packed manifest.
    """

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
"""The row of a backup about which nothing is known."""
FACTS = tuple(Facts.__dataclass_fields__)
_LATER = ("kind", "database", "revision", "size", "rows", "tables", "taken_by_run", "manifest")
_CHECKED = ("verified_at", "verified_how", "failed_at", "failed_check", "restored_at")
_VALUES = {name: f":{name}" for name in (*FACTS, "place", "created_at")}
_VALUES["manifest"] = (
    "coalesce(:manifest, (SELECT max(manifest) FROM batch_backups AS other "
    "WHERE other.name = :name))"
)

_UPSERT = sql.statement(
    f"INSERT INTO batch_backups ({', '.join(_VALUES)}) VALUES ({', '.join(_VALUES.values())}) "
    "ON CONFLICT (name, place) DO UPDATE SET "
    + ", ".join(f"{name} = coalesce(excluded.{name}, batch_backups.{name})" for name in _LATER)
    + "".join(
        f", {n} = CASE WHEN excluded.size <> batch_backups.size THEN NULL ELSE batch_backups.{n} "
        "END"
        for n in _CHECKED
    ),
    **{name: backups.c[name] for name in _VALUES},
)


async def record(
    connection: AsyncConnection, facts: Facts, place: str, at: datetime, *, is_new: bool = False
) -> None:
    """Write the row of a backup in a place. What is known about it is kept, unless its file has
    another size by now.

    `is_new`: the backup was just made. Then the hash of its manifest is stored, and each copy must
    have the same hash.
    """
    manifest = facts.manifest if is_new else None
    await connection.execute(
        _UPSERT, {**asdict(facts), "manifest": manifest, "place": place, "created_at": at}
    )


async def manifests(connection: AsyncConnection, name: str) -> Sequence[str]:
    """The hashes that the manifests of backups of this name had when they were made. Empty: none is
    known.
    """
    statement = select(backups.c.manifest).where(
        backups.c.name == name, backups.c.manifest.is_not(None)
    )
    return (await connection.execute(statement)).scalars().all()


async def mark_verified(
    connection: AsyncConnection, name: str, place: str, how: str, at: datetime
) -> bool:
    """Write that a check of a backup has succeeded. Returns False if there is no such row.

    `how`: CHECKSUMS or RESTORED. A row with RESTORED keeps that until a check fails.
    """
    how_now = func.coalesce(func.nullif(backups.c.verified_how, CHECKSUMS), how)
    return await _update(
        connection,
        name,
        place,
        verified_at=at,
        verified_how=how_now,
        failed_at=None,
        failed_check=None,
    )


async def mark_failed(
    connection: AsyncConnection, name: str, place: str, why: str, at: datetime
) -> bool:
    """Write that a check of a backup has failed; this replaces a success. Returns False if there is
    no such row.
    """
    return await _update(
        connection, name, place, failed_at=at, failed_check=why, verified_at=None, verified_how=None
    )


async def mark_restored(connection: AsyncConnection, name: str, place: str, at: datetime) -> bool:
    """Write that the application database was restored from a backup. Returns False if there is no
    such row.
    """
    return await _update(connection, name, place, restored_at=at)


async def remove(connection: AsyncConnection, name: str, place: str) -> None:
    """Delete the row of a backup whose file is not in that place any more."""
    await connection.execute(
        delete(backups).where(backups.c.name == name, backups.c.place == place)
    )


async def remove_others(
    connection: AsyncConnection, place: str, names: Collection[str], before: datetime
) -> int:
    """Delete the rows of backups in a place, except those in `names`, whose files were found.
    Returns how many.

    `before`: the instant at which the files were listed. Rows that were written later belong to
    newer files, and stay.
    """
    is_old = (backups.c.place == place) & (backups.c.created_at < before)
    deleted = await connection.execute(
        delete(backups).where(backups.c.name.not_in(list(names)), is_old)
    )
    return deleted.rowcount


async def get(connection: AsyncConnection, name: str, place: str) -> Row | None:
    """The row of a backup in a place; None if there is none."""
    rows = await _rows(connection, backups.c.name == name, backups.c.place == place)
    return rows[0] if rows else None


async def all_rows(connection: AsyncConnection) -> Sequence[Row]:
    """All rows, newest backup first."""
    return await _rows(connection)


async def _rows(connection: AsyncConnection, *conditions: Any) -> list[Row]:
    order = (backups.c.taken_at.desc(), backups.c.name.desc(), backups.c.place)
    rows = await connection.execute(select(backups).where(*conditions).order_by(*order))
    return [dict(row) for row in rows.mappings()]


async def _update(connection: AsyncConnection, name: str, place: str, **values: Any) -> bool:
    is_meant = (backups.c.name == name) & (backups.c.place == place)
    return bool((await connection.execute(update(backups).where(is_meant).values(values))).rowcount)


def state(row: Mapping[str, Any]) -> str:
    """A word for people: `restored`, `checksums`, `failed` or `not verified`."""
    if row["failed_at"] is not None:
        return "failed"
    return str(row["verified_how"] or "not verified")
