"""The histories of migrations of the application's database. (The ledger has its own.)"""

from __future__ import annotations

from pathlib import Path

from service.database.migrate import History

_HERE = Path(__file__).parent
_CLONES = _HERE.parent / "application" / "migrations"


DATA_HISTORY = History(_HERE / "migrations", "batch_data_alembic_version")
"""That of our tables beside the authors' data."""

APPLICATION_HISTORIES = (
    *([History(_CLONES, "alembic_version")] if _CLONES.is_dir() else []),
    DATA_HISTORY,
)
"""All migrations of the application's database that are executed here.

A clone has an application of its own (service/application), whose migrations come first. The
installed package has none: there `alembic_version` belongs to the application that the package is
installed into.
"""
