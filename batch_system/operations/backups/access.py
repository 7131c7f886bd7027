"""What every operation on backups needs: the settings about backups, and their records in the
ledger.

Operations on backups also work on a machine without a ledger. Then nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.backup.file.folder import taken_at
from batch_system.backup.places.place import FOLDER, Places
from batch_system.batch.ledger import backups
from batch_system.batch.ledger.backups import Row
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.tables import backups as table
from batch_system.database.histories import application_histories
from batch_system.database.migrate import History
from batch_system.errors import DatabaseError
from batch_system.logs import get_logger
from batch_system.operations.asking.databases import Databases
from batch_system.settings.settings import Settings
from batch_system.settings.urls import FILE, folder_of

T = TypeVar("T")
Statements = Callable[[AsyncConnection], Awaitable[T]]
"""Executes statements on a connection to the ledger."""

logger = get_logger(__name__)


@dataclass(frozen=True)
class BackupAccess:
    """Gives access to the places of backups and to their records.

    Attributes:
        settings: Where backups are, which are kept, and which tables they include.
    """

    settings: Settings
    databases: Databases

    @property
    def places(self) -> Places:
        """BACKUP_DIR and BACKUP_URL."""
        return Places.of(self.settings)

    @property
    def histories(self) -> tuple[History, ...]:
        """All migrations whose tables a backup may have; a ledger may be in the same database."""
        return (*application_histories(self.settings.BATCH_MIGRATIONS), LEDGER_HISTORY)

    def place_of(self, source: str) -> str | None:
        """The place of a backup by its name in the ledger; None if it is in neither BACKUP_DIR nor
        BACKUP_URL.
        """
        path, url = Path(source), self.settings.BACKUP_URL
        if taken_at(path) is None:
            return None
        if "://" in source:
            return url if source == f"{url}/{path.name}" else None
        folder = path.resolve().parent
        if folder == self.settings.BACKUP_DIR.resolve():
            return FOLDER
        return url if url and url.startswith(FILE) and folder == folder_of(url).resolve() else None

    async def in_ledger(
        self, statements: Statements[T], *, reads: bool = False, migrates: bool = True
    ) -> T | None:
        """Execute statements in one transaction in the ledger; None if there is no ledger yet.

        `reads`: the statements only read, so they wait for no lock, and the ledger is not migrated.
        `migrates`: an older ledger is migrated first; otherwise it is an error. Raises
        DatabaseError.
        """
        ledger = self.databases.ledger
        if not await self.databases.has_ledger():
            return None
        try:
            is_older = not self.databases.is_migrated and not await self._has_columns()
            if is_older and not migrates:
                raise DatabaseError(
                    "the ledger is at an older migration than this code; `batch serve` migrates it"
                )
            if is_older and not reads:
                await self.databases.migrate_ledger()
            async with (ledger.reader if reads else ledger.engine).begin() as connection:
                return await statements(connection)
        except (DBAPIError, OSError) as error:
            raise ledger.unreachable(error) from error

    async def _has_columns(self) -> bool:
        """Whether the ledger's table of backups has the columns that this code expects."""
        async with self.databases.ledger.reader.connect() as connection:
            return await connection.run_sync(_has_columns)

    async def read_ledger(self, query: Statements[T]) -> T | None:
        """Read the records of backups; None if there is no ledger yet.

        Raises DatabaseError, also if the ledger is older than this code, so that its table has
        other columns.
        """
        return await self.in_ledger(query, reads=True, migrates=False)

    async def record_if_possible(self, name: str, write: Statements[None]) -> None:
        """Record what was done with the backup `name`, or log a warning if the ledger can't be used
        or is older.

        This is not an error, because the work on the backup is done, and the ledger may be the
        database that a restore replaces.
        """
        try:
            await self.in_ledger(write, migrates=False)
        except DatabaseError as error:
            logger.warning(
                f"What was done with {name} could not be recorded in the ledger: {error.message}"
            )

    async def records(self) -> dict[tuple[str, str], Row]:
        """The ledger's records of backups, by place and name. Raises DatabaseError."""
        return {
            (row["place"], row["name"]): row
            for row in await self.read_ledger(backups.all_rows) or ()
        }


def _has_columns(connection: Connection) -> bool:
    present = inspect(connection)
    if not present.has_table(table.name):
        return False
    return set(table.columns.keys()) <= {
        column["name"] for column in present.get_columns(table.name)
    }
