"""Reads a whole backup, on two threads, and compares it with its own checksums. It restores nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from service.backup.file.format import DATABASE, SQLITE, Member
from service.backup.file.reader import Backup, Source, damaged, first_header
from service.backup.file.sqlite_pages import layout
from service.concurrency.stoppable import Stop
from service.errors import BackupError

READERS = 2


@dataclass(frozen=True)
class Checked:
    """What was read and found to be exactly what was written. `bytes` are those of the content."""

    rows: int
    bytes: int
    members: int


def verify(source: Source, stop: Stop, on_member: Callable[[Member], None] | None = None) -> Checked:
    """Raises BackupError, which names the first wrong member, when a byte of the file is not what was written.

    That covers gzip's own headers and checksums, members that are missing, doubled or at another place, and what
    stands before, between and after them: the manifest has the place and the hash of each, the trailer the manifest's.
    """
    header = first_header(source)  # before the manifest is in memory
    backup = Backup.open(source)
    if header is None or replace(header, rows=backup.header.rows) != backup.header:
        raise damaged(source, "its header is not the one that its manifest repeats")
    _Reading(backup, stop, on_member).run()
    if backup.header.kind == SQLITE:
        _refuse_no_database(backup)
    rows = sum(table.rows for table in backup.tables)
    return Checked(rows, sum(member.bytes for member in backup.members), len(backup.members))


def _refuse_no_database(backup: Backup) -> None:
    """What does not begin as a database of that size was never one that this service saved."""
    size = sum(member.bytes for member in backup.members if member.name == DATABASE)
    try:
        layout(next(backup.pieces(), b"")).refuse_another_size(size)
    except ValueError as error:
        raise damaged(backup.source, f"its database is none of SQLite's: {error}") from error


class _Reading:
    """Hands out the members in their order; after a wrong one no more, but what was handed out is read to its end."""

    def __init__(self, backup: Backup, stop: Stop, on_member: Callable[[Member], None] | None) -> None:
        self._backup = backup
        self._stop = stop
        self._on_member = on_member
        self._lock = threading.Lock()
        self._next = 0
        self._wrong: dict[int, BackupError] = {}

    def run(self) -> None:
        with ThreadPoolExecutor(READERS, thread_name_prefix="backup-verify") as readers:
            for reader in [readers.submit(self._read) for _ in range(READERS)]:
                reader.result()
        if self._wrong:
            raise self._wrong[min(self._wrong)]

    def _read(self) -> None:
        while (number := self._take()) is not None:
            self._stop.check()
            member = self._backup.members[number]
            try:
                self._backup.content(member)
            except BackupError as error:
                self._wrong[number] = error
            if self._on_member:
                self._on_member(member)

    def _take(self) -> int | None:
        with self._lock:
            if self._wrong or self._next == len(self._backup.members):
                return None
            self._next += 1
            return self._next - 1
