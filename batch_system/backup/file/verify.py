"""Reads a whole backup in two threads, and compares it with its own checksums. Nothing is
restored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from batch_system.backup.file.format import DATABASE, SQLITE, Member
from batch_system.backup.file.reader import Backup, Source, damaged, first_header
from batch_system.backup.file.sqlite_pages import layout
from batch_system.concurrency.stoppable import Stop
from batch_system.errors import BackupError

READERS = 2


@dataclass(frozen=True)
class Verified:
    """The numbers of a verified backup: rows, bytes of content, and gzip members."""

    rows: int
    bytes: int
    members: int


def verify(
    source: Source, stop: Stop, on_member: Callable[[Member], None] | None = None
) -> Verified:
    """Raises BackupError, which names the first wrong member, if any byte of the file differs from
    what was written.

    The manifest has the place and the hash of each member, and the trailer has those of the
    manifest. So damage is also noticed in gzip's headers and checksums, in bytes between members,
    and in members that are missing, doubled or moved. `on_member` is called in a reader's thread
    after each member.
    """
    header = first_header(source)  # before the manifest takes memory
    backup = Backup.open(source)
    if header is None or replace(header, rows=backup.header.rows) != backup.header:
        raise damaged(source, "its header is not the one that its manifest repeats")
    _Reading(backup, stop, on_member).run()
    if backup.header.kind == SQLITE:
        _refuse_no_database(backup)
    rows = sum(table.rows for table in backup.tables)
    return Verified(rows, sum(member.bytes for member in backup.members), len(backup.members))


def _refuse_no_database(backup: Backup) -> None:
    """Raises DamagedBackup unless the database file begins like an SQLite database of its size."""
    size = sum(member.bytes for member in backup.members if member.name == DATABASE)
    try:
        layout(next(backup.pieces(), b"")).refuse_another_size(size)
    except ValueError as error:
        raise damaged(backup.source, f"its database is not one of SQLite: {error}") from error


class _Reading:
    """Reads the members in order in several threads.

    After a wrong member no further one is begun, but those in progress are read to their end, so
    that the first wrong one is known.
    """

    def __init__(
        self, backup: Backup, stop: Stop, on_member: Callable[[Member], None] | None
    ) -> None:
        self._backup = backup
        self._stop = stop
        self._on_member = on_member
        self._lock = threading.Lock()
        self._next = 0
        self._errors: dict[int, BackupError] = {}

    def run(self) -> None:
        with ThreadPoolExecutor(READERS, thread_name_prefix="backup-verify") as readers:
            for reader in [readers.submit(self._read) for _ in range(READERS)]:
                reader.result()
        if self._errors:
            raise self._errors[min(self._errors)]

    def _read(self) -> None:
        while (number := self._take()) is not None:
            self._stop.check()
            member = self._backup.members[number]
            try:
                self._backup.content(member)
            except BackupError as error:
                self._errors[number] = error
            if self._on_member:
                self._on_member(member)

    def _take(self) -> int | None:
        with self._lock:
            if self._errors or self._next == len(self._backup.members):
                return None
            self._next += 1
            return self._next - 1
