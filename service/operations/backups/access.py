"""What every operation on backups needs: the settings that are about them, and the ledger that knows of them.

Everything works without a ledger too, on a machine where none is yet: then nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.backup.file.folder import taken_at
from service.backup.places.place import FOLDER, Places
from service.batch.ledger import backups
from service.batch.ledger.backups import Row
from service.batch.ledger.tables import backups as table
from service.config import Settings
from service.errors import DatabaseError
from service.logs import get_logger
from service.operations.databases import Databases
from service.placeurl import FILE, folder_of

T = TypeVar("T")
Work = Callable[[AsyncConnection], Awaitable[T]]

logger = get_logger(__name__)


@dataclass(frozen=True)
class BackupAccess:
    """Places and records of backups.

    Attributes:
        settings: Where backups are, which are kept, and what they are made of.
    """

    settings: Settings
    databases: Databases

    @property
    def places(self) -> Places:
        """The folder of backups, and where they are copied to."""
        return Places.of(self.settings)

    def place_of(self, source: str) -> str | None:
        """In which of our places a backup is, as the ledger calls it; None: it is somebody else's file."""
        path, url = Path(source), self.settings.BACKUP_URL
        if taken_at(path) is None:
            return None
        if "://" in source:
            return url if source == f"{url}/{path.name}" else None
        folder = path.resolve().parent
        if folder == self.settings.BACKUP_DIR.resolve():
            return FOLDER
        return url if url and url.startswith(FILE) and folder == folder_of(url).resolve() else None

    async def recorded(self, work: Work[T], *, reads: bool = False, migrates: bool = True) -> T | None:
        """One transaction in the ledger; None where there is none yet. Raises DatabaseError.

        An older ledger is migrated before; with `migrates=False` it is an error, and nothing is changed. `reads`: it
        waits for no lock, and migrates nothing either.
        """
        ledger = self.databases.ledger
        if not await self.databases.has_ledger():
            return None
        try:
            async with ledger.reader.connect() as connection:
                is_older = not await connection.run_sync(_has_places)
            if is_older and not migrates:
                raise DatabaseError("the ledger is at an older migration than this code; `batch serve` migrates it")
            if is_older and not reads:
                await self.databases.migrate_ledger()
            async with (ledger.reader if reads else ledger.engine).begin() as connection:
                return await work(connection)
        except (DBAPIError, OSError) as error:
            raise ledger.unreachable(error) from error

    async def asked(self, query: Work[T]) -> T | None:
        """Reads what the ledger knows of backups; None where there is none yet. Raises DatabaseError, also where the
        ledger is older than this code, so that its table looks otherwise."""
        return await self.recorded(query, reads=True, migrates=False)

    async def noted(self, name: str, write: Work[None]) -> None:
        """As `recorded`; but where the ledger is away, or older than this code, that is only logged: the work on the
        backup itself is done, and a restore may be about to bring back the ledger as it is."""
        try:
            await self.recorded(write, migrates=False)
        except DatabaseError as error:
            logger.warning(f"The ledger has not heard what was done with {name}: {error.message}")

    async def known(self) -> dict[tuple[str, str], Row]:
        """What the ledger knows of backups, by place and name. Raises DatabaseError."""
        return {(row["place"], row["name"]): row for row in await self.asked(backups.listed) or ()}


def _has_places(connection: Connection) -> bool:
    """Whether the ledger has its table of backups as this code knows it."""
    tables = inspect(connection)
    return tables.has_table(table.name) and "place" in {column["name"] for column in tables.get_columns(table.name)}
