"""File watch: a thread that notices when another process leaves a notification in an SQLite file.

On Linux, inotify reports each write to the file. The thread then looks repeatedly for as long as a
commit may take, and rests until the next write. On other systems, and if the user has no inotify
watch left, it looks all the time. A look reads one number in memory that SQLite shares between all
processes of the file. Only if that number shows a commit does a second statement read the
notifications (see ledger/wakes.py).
"""

from __future__ import annotations

import asyncio
import select
import socket
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from itertools import chain, repeat

from batch_system.batch.ledger.wakes import ASKED, CATALOG, QUEUED, Wake
from batch_system.database.engine import Database

if sys.platform == "linux":
    from inotify_simple import INotify, flags

STEP, COMMIT_STEPS = 0.01, 30
"""Seconds between two looks, and the number of looks after a write. Inotify reports a write before
its commit, which waits for the disk.
"""
FIRST_STEPS: tuple[float, ...] = (0.001, 0.002, 0.004)
"""The first steps after a quiet time, before the others."""
LONG_STEP, SHORT_STEPS = 0.02, 200
"""The step if the system does not report writes. After a notification, this many steps are as short
as STEP.
"""
LONGEST_REST = 1.0
"""The longest wait for a write, in seconds. A look follows in any case."""
REOPEN_SECONDS = 1.0
"""The seconds until the file is opened again after an error."""

Numbers = dict[int, int]


class FileWatch:
    """Watches the SQLite file of one ledger."""

    def __init__(self, database: Database, on_wake: Callable[[Wake], None]) -> None:
        """`on_wake` is called on the running event loop."""
        place, options = database.engine.dialect.create_connect_args(database.url)
        self._connect: Callable[[], sqlite3.Connection] = partial(
            sqlite3.connect, *place, **{**options, "isolation_level": None}
        )
        self._on_wake = on_wake
        self._loop = asyncio.get_running_loop()
        self._stop, self._is_stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="batch-file-watch", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End the thread, which takes a moment."""
        self._stop.send(b"!")  # a close has no effect while a forked process has this socket, too
        self._thread.join(1)
        self._stop.close()

    def _watch(self) -> None:
        has_ended = False
        with self._is_stopped:
            while not has_ended:
                try:
                    with closing(self._connect()) as connection:
                        has_ended = self._look_again_and_again(connection.cursor())
                except sqlite3.Error:  # such as a full disk: the polls report it
                    has_ended = bool(select.select([self._is_stopped], [], [], REOPEN_SECONDS)[0])

    def _look_again_and_again(self, cursor: sqlite3.Cursor) -> bool:
        """Look repeatedly until this is stopped, then return True. No transaction stays open
        between two looks.
        """
        self._tell(Wake(None))  # a notification may have come before
        version, numbers = _version(cursor), _numbers(cursor)
        with closing(_Pauses(self._is_stopped, cursor)) as pauses:
            while pauses.wait():
                if (new_version := _version(cursor)) == version:
                    continue
                version, before, numbers = new_version, numbers, _numbers(cursor)
                if (wake := _difference(before, numbers)) != Wake():
                    pauses.shorten()
                    self._tell(wake)
        return True

    def _tell(self, wake: Wake) -> None:
        with suppress(RuntimeError):  # the loop is closed, so this is stopping
            self._loop.call_soon_threadsafe(self._on_wake, wake)


class _Pauses:
    """The pauses between two looks."""

    def __init__(self, is_stopped: socket.socket, cursor: sqlite3.Cursor) -> None:
        """`is_stopped` becomes readable when the watch should end. `cursor`: a cursor on the
        watched file.
        """
        self._writes = _writes(cursor)
        self._stop = select.poll()
        self._stop_or_write = select.poll()
        for poll in (self._stop, self._stop_or_write):
            poll.register(is_stopped, select.POLLIN)
        if self._writes is not None:
            self._stop_or_write.register(self._writes, select.POLLIN)
        self._steps: Iterator[float] = repeat(STEP, COMMIT_STEPS)

    def wait(self) -> bool:
        """Wait until a look is due. Returns False if the watch should end."""
        step = next(self._steps, None)
        if self._writes is None:
            return not self._stop.poll((step or LONG_STEP) * 1000)
        if step is None:
            ready, first_steps = self._stop_or_write.poll(LONGEST_REST * 1000), FIRST_STEPS
        else:
            ready, first_steps = self._stop.poll(step * 1000), ()
        if any(place != self._writes.fileno() for place, _ in ready):
            return False
        if self._writes.read(timeout=0):
            self._steps = chain(first_steps, repeat(STEP, COMMIT_STEPS))
        return True

    def shorten(self) -> None:
        """Look more often for a while, because more notifications may follow soon."""
        if self._writes is None:
            self._steps = repeat(STEP, SHORT_STEPS)

    def close(self) -> None:
        if self._writes is not None:
            self._writes.close()


def _writes(cursor: sqlite3.Cursor) -> INotify | None:
    """An inotify instance that becomes readable when the file of this connection is written; None
    if the system offers none.
    """
    if sys.platform != "linux":
        return None
    file = cursor.execute("SELECT file FROM pragma_database_list WHERE name = 'main'").fetchall()[
        0
    ][0]
    try:
        writes = INotify()
    except OSError:  # the user has no inotify watch left
        return None
    try:
        for path in (file, f"{file}-wal"):
            writes.add_watch(path, flags.MODIFY)
    except OSError:
        writes.close()
        return None
    return writes


def _version(cursor: sqlite3.Cursor) -> int:
    """A number that changes when another connection commits."""
    return int(cursor.execute("PRAGMA data_version").fetchall()[0][0])


def _numbers(cursor: sqlite3.Cursor) -> Numbers:
    return dict(cursor.execute("SELECT id, version FROM batch_catalog").fetchall())


def _difference(before: Numbers, now: Numbers) -> Wake:
    changed = {row for row, number in now.items() if number != before.get(row)}
    return Wake(
        None if QUEUED in changed else frozenset(), not changed.isdisjoint({CATALOG, ASKED})
    )
