"""Backups of the application's database: `await create_backup(folder)`.

A backup is one file, `backup_YYYYMMDD_HHMMSS.backup.gz` (UTC), readable by this user only. It is a tar, so
`tar tzf` lists it: concatenated gzip members, of which each holds a tar header and whole COPY rows of about 2 MiB.

    header.json                            format version, kind of database, server version, when it was taken
    data/0001-public.users/0001.copy …     PostgreSQL: rows as COPY writes them in text format, UTF-8
    database.sqlite3                       SQLite: the database file
    manifest.json                          every gzip member with its place and sha256; every table; sequences' values

A file of more than about 2 MiB goes over as many gzip members as it takes. After the tar stands a trailer, a gzip
member of nothing, whose extra field says where the manifest is. The folders' names are numbered, shortened and
percent-encoded; which table is in which, the manifest says. A table's rows come in no particular order.

What is promised: the content is one consistent instant of the database, and before the file got its name it was read
back and every byte compared with the manifest's checksums. Nothing was restored: that the rows load into the schema
of another day is not proven by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.backup.making.create import create_backup as create_backup
    from service.backup.making.create import create_backup_sync as create_backup_sync

__all__ = ["create_backup", "create_backup_sync"]


def __getattr__(name: str) -> Any:
    """Loaded when it is first asked for: the process that makes a backup has no use for SQLAlchemy."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from service.backup.making import create

    return getattr(create, name)
