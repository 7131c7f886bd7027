"""Checkpoints of SQLite's write-ahead log in the background, so that commits need not wait for
them.
"""

from __future__ import annotations

import asyncio
from typing import Any

from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

from batch_system.concurrency.background import Background, OnEnd
from batch_system.concurrency.offload import offload
from batch_system.database import lock_holder, troubles
from batch_system.database.engine import Database, execute_once
from batch_system.errors import BatchError
from batch_system.logs import get_logger

logger = get_logger("batch_system.database")

CHECKPOINT_SECONDS = 2.0
"""The wait between a transaction and the checkpoint that follows it."""
MOST_PAGES = 16_000
"""Above this size of the log (66 MB), commits make checkpoints, too, because the log grows while
there are always writers.
"""
PAGE_BYTES = 4_096 + 24
"""The size of a page in the log."""
AUTOCHECKPOINT = f"PRAGMA wal_autocheckpoint = {MOST_PAGES}"


class Checkpoints(Background):
    """Copies the commits of this process from SQLite's log into its file, in a reader's thread.

    SQLite itself does that within the commit that finds 1,000 pages in the log. It takes ten
    milliseconds, and after the commit of many slots a tenth of a second, in which none of their
    runs can start. A checkpoint in the background disturbs neither readers nor writers, and also
    writes the log to the disk, which no commit does.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._has_written = asyncio.Event()
        self._warning = ""
        self._told_pages = 0
        """The size of the log, in pages, when the last warning said that it can't be copied; 0 if
        it can.
        """

    def start(self, on_end: OnEnd | None = None) -> None:
        event.listen(self._database.engine.sync_engine, "connect", self._leave_checkpoints)
        event.listen(self._database.engine.sync_engine, "checkin", self._on_return)
        super().start(on_end)

    async def _loop(self) -> None:
        is_set = False  # for the writers' connection, which is already open
        while True:
            try:
                if not is_set:
                    async with self.limited_turn(), self._database.engine.begin() as connection:
                        await connection.exec_driver_sql(AUTOCHECKPOINT)
                    is_set = True
                await self._has_written.wait()
                await asyncio.sleep(CHECKPOINT_SECONDS)
                self._has_written.clear()
                async with self.limited_turn():
                    await self.checkpoint()
                self._warning = ""
            except (DBAPIError, BatchError, TimeoutError) as error:
                self._warn_once(
                    f"the write-ahead log can't be copied now: {troubles.cause_of(error, 'sqlite')}"
                )
                await asyncio.sleep(CHECKPOINT_SECONDS)

    async def checkpoint(self) -> None:
        """Copy from the log into the file what no reader needs any more. Never waits."""
        async with self._database.reader.connect() as connection:
            row: Any = (await connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")).one()
            _, pages, copied = row
        if pages <= MOST_PAGES or pages == copied:
            self._told_pages = 0
        elif pages >= 2 * self._told_pages:
            self._told_pages = pages
            await self._tell_growth(pages, copied)

    async def _tell_growth(self, pages: int, copied: int) -> None:
        """Nothing that was committed after the beginning of a reading transaction can be copied
        before its end.
        """
        file = self._database.url.database or ""
        readers = await offload(lock_holder.readers, file)
        by = f" (these processes read now: {', '.join(map(str, readers))})" if readers else ""
        logger.warning(
            f"the write-ahead log of {file} has {pages * PAGE_BYTES / 1e6:,.0f} MB, and "
            f"{(pages - copied) * PAGE_BYTES / 1e6:,.0f} MB of it can't be copied into the file, "
            f"because a transaction that reads has been open for long{by}: the log grows until "
            "that transaction ends"
        )

    def _leave_checkpoints(self, connection: Any, _: Any) -> None:
        execute_once(connection, AUTOCHECKPOINT)

    def _on_return(self, *_: Any) -> None:
        """A writer has returned its connection. SQLAlchemy's event `commit` comes before the
        commit.
        """
        self._has_written.set()

    def _warn_once(self, message: str) -> None:
        if message != self._warning:
            logger.warning(message)
        self._warning = message


def of(database: Database) -> list[Checkpoints]:
    """The checkpoints of a database, which the caller has to start. PostgreSQL makes its own."""
    return [Checkpoints(database)] if database.kind == "sqlite" else []
