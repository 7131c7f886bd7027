"""Hands over to the ledger the starts that were committed with the application's data.

The runs are inserted in one transaction of the ledger, and their rows deleted in one of the
application's database afterwards. Whoever dies in between leaves rows whose runs exist already: the
next service finds their ids in the ledger, and only deletes the rows.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError
from sqlalchemy import BigInteger, Column, Row, Text, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.selectable import TextualSelect

from batch_system.batch.ledger import database_time, json_rows, merges, runs
from batch_system.batch.ledger import tasks as known_tasks
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import RunState
from batch_system.batch.nodes.ledger_poll import LedgerChanges
from batch_system.batch.nodes.outage import Outage
from batch_system.batch.queue import enqueue
from batch_system.batch.queue.start_rows import StoredStart
from batch_system.concurrency.background import Background
from batch_system.concurrency.offload import offload
from batch_system.database import sql
from batch_system.database.companions import starts
from batch_system.database.engine import Database
from batch_system.errors import DatabaseError
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

PAGE_ROWS, PAGE_BYTES = 500, 4_000_000
"""At most so many starts, and bytes of them, are in memory at a time; at least one start."""
UNKNOWN = "no service has loaded this task"
MOST_LEFT = 5
"""A node without the duty of the watch looks after this many polls: every five seconds."""
MOST_UNREADABLE = 1_000
QUIET = range(2, 30)
"""After so many polls that found a SQLite file as it was before, none looks into it. The first may
miss a change within the same tick of the file system's clock; a network file system may tell of one
late.
"""

_SIZES = {"sqlite": "length(CAST(run AS BLOB))", "postgresql": "octet_length(CAST(run AS text))"}


def _page(kind: str, condition: str) -> TextualSelect:
    """The next rows after :after, as far as those before them have less than PAGE_BYTES. `run` is a
    text, which need not be JSON in a file of SQLite.
    """
    columns = "number, id, at, follow_up, run"
    statement = sql.statement(
        f"SELECT {columns} FROM (SELECT s.*, sum(s.size) OVER (ORDER BY s.number) - s.size AS "
        f"others FROM (SELECT number, id, at, follow_up, CAST(run AS text) AS run, "
        f"{_SIZES[kind]} AS size FROM batch_starts WHERE {condition} ORDER BY number "
        f"LIMIT {PAGE_ROWS}) AS s) AS p "
        f"WHERE p.others < {PAGE_BYTES} ORDER BY number",
        after=BigInteger(),
        **({"group": starts.c.follow_up} if ":group" in condition else {}),
    )
    run = Column("run", Text)
    return statement.columns(starts.c.number, starts.c.id, starts.c.at, starts.c.follow_up, run)


PAGES = {kind: _page(kind, "number > :after") for kind in _SIZES}
GROUPS = {kind: _page(kind, "follow_up = :group AND number > :after") for kind in _SIZES}


Place = tuple[int, str]
"""The number and the id of a row."""


class ApplicationAway(DatabaseError):
    """The application's database can't be used now."""


class Handover(Background):
    """Hands over starts when it is woken: after a commit in this process, and at each poll, because
    other processes may have committed some.
    """

    def __init__(
        self,
        application: Database,
        ledger: Database,
        keep: timedelta,
        on_queued: Callable[[], None],
        outage: Outage,
        watches: Callable[[], bool],
    ) -> None:
        """`keep`: see `hand_over`. `on_queued`: called when runs were queued. `watches`: whether
        this node has the duty of the watch, and so looks at each poll; others look now and then,
        because their application's database may be another one.
        """
        self._application = application
        self._ledger = ledger
        self._keep = keep
        self._on_queued = on_queued
        self._outage = outage
        self._watches = watches
        self._woken = asyncio.Event()
        self._left = 0
        self._files: Sequence[tuple[int, ...]] = ()  # so that the first poll looks
        self._quiet = QUIET.start - 1
        """How many polls in turn found the files of a SQLite database as they were before."""
        self._has_changed = False
        self._warning = ""
        self._unreadable: set[str] = set()
        self.wake()  # for what was left before

    def on_changes(self, changes: LedgerChanges) -> None:
        """Take the result of a ledger poll."""
        self._left += 1
        self._woken.set()

    def wake(self) -> None:
        """Look for starts. Returns at once."""
        self._is_asked = True
        self._woken.set()

    async def _is_due(self) -> bool:
        """Whether to look for starts now: because somebody asks, or after a poll."""
        if not self._is_asked:
            self._has_changed |= not await self._is_quiet()
            looks = self._watches() or self._left >= MOST_LEFT or self._outage.has_failed(self.name)
            if not self._has_changed or not looks:
                return False
        self._is_asked = self._has_changed = False
        self._left = 0
        return True

    async def _is_quiet(self) -> bool:
        """Whether nobody has written to the application's database since the last poll, if that
        costs no statement to know.
        """
        if self._application.kind != "sqlite":
            return False
        files = await offload(_stamps_of, f"{self._application.url.database}")
        self._quiet = self._quiet + 1 if files == self._files else 0
        self._files = files
        if self._quiet >= QUIET.stop:
            self._quiet = QUIET.start - 1
        return self._quiet in QUIET

    async def _loop(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            if not await self._is_due():
                continue
            try:
                await self._hand_over_all()
                self._outage.over_for(self.name)
                self._warning = ""
            except (ApplicationAway, TimeoutError) as error:
                # Which database does not answer in time is not known here. If it is the ledger,
                # other parts tell that.
                self._files = ()  # so that the next poll looks
                why = str(error) or "a database does not answer in time"
                self._warn_once(f"no starts can be handed over to the ledger: {why}")
            except Exception as error:  # the background loop's boundary; the next look finds them
                self._files = ()
                if self._outage.cause_for(self.name, self._ledger, error) is None:
                    logger.exception("the handing over of starts failed; it is tried again")

    async def _hand_over_all(self) -> None:
        after: int | None = 0
        while after is not None:
            async with self.limited_turn():
                after = await hand_over(
                    self._application, self._ledger, self._keep, self._unreadable, after
                )
            if after is not None:
                self._on_queued()

    def _warn_once(self, message: str) -> None:
        if message != self._warning:
            logger.warning(message)
        self._warning = message


async def hand_over(
    application: Database,
    ledger: Database,
    keep: timedelta,
    unreadable: set[str] | None = None,
    after: int = 0,
) -> int | None:
    """Hand over the next starts after this number: a page, and the whole groups of its rows.

    What was committed while a page was handed over may have lower numbers than its last row. So the
    next page begins at the same number, unless all rows of this page stay.

    `keep`: how long the ledger keeps runs. Older starts are dropped, because their runs may have
    been made, and deleted since. `unreadable`: the ids of the rows that were told to be unreadable;
    they stay for a newer version of the service. Returns the number after which the next page
    begins; None if there are no rows.

    Raises ApplicationAway, and the errors of the driver for the ledger.
    """
    told = unreadable if unreadable is not None else set()
    rows = await _read(application, PAGES, after=after)
    if not rows:
        return None
    alone = await offload(_readable, [row for row in rows if row.follow_up is None], told)
    plain = [(row, start) for row, start in alone if start.merging is None]
    if plain:
        async with ledger.engine.begin() as connection:
            now = await database_time.now_of(connection)
            new = await _new_runs(connection, plain, now, keep)
            # In this order, no two transactions can wait for each other's keys.
            await runs.insert_new(
                connection, sorted(new, key=lambda run: (run.task, run.key or ""))
            )
        await _delete(application, _places(row for row, _ in plain))
    merging = [(row, start) for row, start in alone if start.merging is not None]
    for row, start in merging:
        await _merge(ledger, row, start, keep)
    if merging:
        await _delete(application, _places(row for row, _ in merging))
    is_any_gone = bool(alone)
    for group in dict.fromkeys(row.follow_up for row in rows if row.follow_up is not None):
        is_any_gone |= await _hand_over_group(application, ledger, keep, told, group)
    return after if is_any_gone else int(rows[-1].number)


async def _merge(ledger: Database, row: Row[Any], start: StoredStart, keep: timedelta) -> None:
    """Hand over a start that is merged with others, in a transaction of its own: it locks the row
    of its key.
    """
    async with ledger.engine.begin() as connection:
        now = await database_time.now_of(connection)
        new = await _new_runs(connection, [(row, start)], now, keep)
        if not new or not await merges.is_first(connection, row.id, row.at):
            return
        if new[0].state == RunState.CANCELLED:
            await runs.insert_new(connection, new)
            return
        assert start.merging is not None
        await enqueue.merge(connection, new[0], start.merging.merging())


async def _hand_over_group(
    application: Database, ledger: Database, keep: timedelta, told: set[str], group: str
) -> bool:
    """Insert a follow-up and its members in one transaction, so that nobody sees half a group.

    Nothing is inserted if the follow-up is there already, or another run with its key. If a row is
    unreadable, the whole group stays, and the result is False.
    """
    done: list[Place] = []
    is_new = True
    async with ledger.engine.begin() as connection:
        now = await database_time.now_of(connection)
        while rows := await _read(
            application, GROUPS, group=group, after=done[-1][0] if done else 0
        ):
            readable = await offload(_readable, rows, told)
            if len(readable) < len(rows):
                await connection.rollback()
                return False
            new = await _new_runs(connection, readable, now, keep)
            if not done:  # the first row is that of the follow-up
                is_new = await runs.insert_new(connection, new[:1]) == 1
                new = new[1:]
            if is_new:
                await runs.insert_new(connection, new)
            done += _places(rows)
    await _delete(application, done)
    return True


def _readable(rows: Sequence[Row[Any]], told: set[str]) -> list[tuple[Row[Any], StoredStart]]:
    """The rows that this version understands, and what they ask for. Others are told once."""
    found = []
    for row in rows:
        try:
            found.append((row, StoredStart.of(row)))
        except ValidationError as error:
            if row.id not in told and len(told) < MOST_UNREADABLE:
                told.add(row.id)
                first = error.errors(include_input=False)[0]
                logger.error(
                    f"the start {row.id} in batch_starts can't be read, and stays there: "
                    f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
                )
    return found


async def _new_runs(
    connection: AsyncConnection,
    asked: Sequence[tuple[Row[Any], StoredStart]],
    now: datetime,
    keep: timedelta,
) -> list[NewRun]:
    """The runs of these starts. If nobody has loaded its task, a run is cancelled. Those that are
    too old are left out.
    """
    new = [start.new_run(row.at, now) for row, start in asked if row.at > now - keep]
    if len(new) < len(asked):
        dropped = Counter(start.task for row, start in asked if row.at <= now - keep)
        logger.warning(
            f"starts that are older than {keep.days} days (KEEP_RUNS_DAYS) were dropped: "
            + ", ".join(f"{number:,} of {task}" for task, number in sorted(dropped.items()))
        )
    known = await known_tasks.loaded(connection, {run.task for run in new}) if new else frozenset()
    for run in new:
        if run.task not in known:
            run.cancel(UNKNOWN, now)
    return new


async def _read(
    application: Database, pages: Mapping[str, TextualSelect], **values: Any
) -> Sequence[Row[Any]]:
    try:
        async with application.reader.connect() as connection:
            return (await connection.execute(pages[application.kind], values)).all()
    except (DBAPIError, OSError) as error:
        raise _away(application, error) from error


def _places(rows: Iterable[Row[Any]]) -> list[Place]:
    return [(row.number, row.id) for row in rows]


async def _delete(application: Database, places: Sequence[Place]) -> None:
    """Delete these rows, unless another node has done so: SQLite may have given their numbers to
    new rows since.
    """
    kind = application.kind
    columns = (starts.c.number, starts.c.id)
    is_done = " AND ".join(
        sql.among(each.name, f"SELECT v.{each.name} FROM {json_rows.source([each], kind)}", kind)
        for each in columns
    )
    statement = text(f"DELETE FROM batch_starts WHERE {is_done}")
    values = json_rows.encode(({"number": number, "id": id} for number, id in places), kind)
    try:
        async with application.engine.begin() as connection:
            await connection.execute(statement, {"rows": values})
    except (DBAPIError, OSError) as error:
        raise _away(application, error) from error


def _stamps_of(file: str) -> Sequence[tuple[int, ...]]:
    """What changes when somebody writes to a SQLite database: of its file, and of its log, which is
    empty for whoever has only opened it.
    """
    stamps: list[tuple[int, ...]] = []
    for name in (file, f"{file}-wal"):
        try:
            found = os.stat(name)
        except OSError:
            stamps.append(())
            continue
        stamps.append((found.st_ino, found.st_mtime_ns, found.st_size) if found.st_size else ())
    return stamps


def _away(application: Database, error: BaseException) -> ApplicationAway:
    return ApplicationAway(application.why(error))
