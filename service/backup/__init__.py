"""Backups of the application's database: `await create_backup(folder)`.

A backup is one file, `backup_YYYYMMDD_HHMMSS.backup.gz` (UTC), readable by this user only. It is a tar, so
`tar tzf` lists it: concatenated gzip members, of which each holds a tar header and whole COPY rows of about 2 MiB.

    header.json                            format version, kind of database, server version, when it was taken
    data/0001-public.users/0001.copy …     PostgreSQL: rows as COPY writes them in text format, UTF-8
    database.sqlite3                       SQLite: the database file, in as many gzip members as it takes
    manifest.json                          every member with bytes, rows, sha256; every table; the sequences' values

The folders' names are numbered, shortened and percent-encoded; which table is in which, the manifest says.

What is promised: the content is one consistent instant of the database, and before the file got its name it was read
back and every byte compared with the checksums of gzip and of the manifest. Nothing was restored: that the rows load
into the schema of another day is not proven by it.
"""

from service.backup.create import create_backup

__all__ = ["create_backup"]
