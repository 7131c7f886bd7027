"""The histories of migrations of the application's database. (The ledger has its own.)"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from batch_system.database.migrate import ALEMBIC_VERSION, History

DATA_WINDOWS = "batch_data_windows"
DATA_HISTORY = History(
    Path(__file__).parent / "migrations", "batch_data_alembic_version", DATA_WINDOWS
)
"""That of our tables beside the authors' data."""


@cache
def application_histories(migrations: Path | None) -> tuple[History, ...]:
    """All migrations of the application's database that a service executes.

    `migrations`: the folder of the application's own migrations (the setting BATCH_MIGRATIONS),
    which come first. Their window stands in our table. Without it, `alembic_version` belongs to an
    application that migrates its database itself.
    """
    own = [History(migrations, ALEMBIC_VERSION, DATA_WINDOWS)] if migrations else []
    return (*own, DATA_HISTORY)
