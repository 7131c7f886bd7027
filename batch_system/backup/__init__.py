"""Backups of the application's database: `await create_backup(folder)`.

A backup is one file, `backup_YYYYMMDD_HHMMSS.backup.gz` (UTC), which only this user may read. It is
a tar archive in gzip members of about 2 MiB each, so `tar tzf` lists its files:

    header.json         format version, kind of database, server version, instant of the backup
    data/0001-public.users/0001.copy …
                        PostgreSQL: whole rows in the text format of COPY, in UTF-8
    database.sqlite3    SQLite: the database file
    manifest.json       place and SHA-256 of every gzip member; tables; the values of sequences

A larger file takes several gzip members. The trailer follows the archive: an empty gzip member
whose extra field gives the place of the manifest. The names of the folders are numbered, shortened
and percent-encoded; the manifest says which table each one belongs to. The rows of a table are in
no particular order.

A backup holds one consistent instant of the database. Before the file gets its name, it is read
back, and every byte is compared with the checksums in the manifest. This does not prove that the
rows can be restored into a later schema.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batch_system.backup.making.create import create_backup as create_backup
    from batch_system.backup.making.create import create_backup_sync as create_backup_sync

__all__ = ["create_backup", "create_backup_sync"]


def __getattr__(name: str) -> Any:
    """Import create_backup on first use, so that the process that makes a backup does not load
    SQLAlchemy.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from batch_system.backup.making import create

    return getattr(create, name)
