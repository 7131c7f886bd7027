"""File watch: a thread that looks every few milliseconds whether another process has told something in an SQLite file.

The look reads one number, which SQLite keeps in memory that all its processes share. Only if somebody has committed
something since, a second statement reads what was told (see ledger/wakes.py).
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial

from service.batch.ledger.wakes import ASKED, CATALOG, QUEUED, Wake
from service.database.engine import Database

STEP = 0.02
"""Seconds between two looks."""
SHORT_STEP, SHORT_STEPS = 0.01, 200
"""After something was told, so many steps are shorter."""
REOPEN_SECONDS = 1.0
"""After an error the file is opened again so much later."""

Numbers = dict[int, int]


class FileWatch:
    """Watches the SQLite file of one ledger."""

    def __init__(self, database: Database, on_wake: Callable[[Wake], None]) -> None:
        """`on_wake` is called on the running event loop."""
        place, options = database.engine.dialect.create_connect_args(database.url)
        self._connect: Callable[[], sqlite3.Connection] = partial(
            sqlite3.connect, *place, **{**options, "isolation_level": None}
        )
        self._on_wake, self._loop = on_wake, asyncio.get_running_loop()
        self._stopped = threading.Lock()  # an acquire with a timeout costs less than the wait for an Event
        self._stopped.acquire()
        self._thread = threading.Thread(target=self._watch, name="batch-file-watch", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End the thread, which takes a step."""
        self._stopped.release()
        self._thread.join(1)

    def _watch(self) -> None:
        has_ended = False
        while not has_ended:
            try:
                with closing(self._connect()) as connection:
                    has_ended = self._look_again_and_again(connection.cursor())
            except sqlite3.Error:  # such as a full disk: the polls report it
                has_ended = self._stopped.acquire(timeout=REOPEN_SECONDS)

    def _look_again_and_again(self, cursor: sqlite3.Cursor) -> bool:
        """Look until this is stopped; then it returns True. No transaction stays open between two looks."""
        self._tell(Wake(None))  # somebody may have told something before
        version, numbers, short_steps = _version(cursor), _numbers(cursor), 0
        while not self._stopped.acquire(timeout=SHORT_STEP if short_steps else STEP):
            short_steps = max(0, short_steps - 1)
            if (new_version := _version(cursor)) == version:
                continue
            version, before, numbers = new_version, numbers, _numbers(cursor)
            if (wake := _difference(before, numbers)) != Wake():
                short_steps = SHORT_STEPS
                self._tell(wake)
        return True

    def _tell(self, wake: Wake) -> None:
        with suppress(RuntimeError):  # the loop is closed: this is being stopped
            self._loop.call_soon_threadsafe(self._on_wake, wake)


def _version(cursor: sqlite3.Cursor) -> int:
    """A number that differs if another connection has committed something since."""
    return int(cursor.execute("PRAGMA data_version").fetchall()[0][0])


def _numbers(cursor: sqlite3.Cursor) -> Numbers:
    return dict(cursor.execute("SELECT id, version FROM batch_catalog").fetchall())


def _difference(before: Numbers, now: Numbers) -> Wake:
    changed = {row for row, number in now.items() if number != before.get(row)}
    return Wake(None if QUEUED in changed else frozenset(), not changed.isdisjoint({CATALOG, ASKED}))
