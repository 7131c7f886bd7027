"""The histories of migrations of the application's database. (That of the ledger is the ledger's own.)"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from service.database.migrate import History

_HERE = Path(__file__).parent
_CLONES = _HERE.parent / "application" / "migrations"


def data_revision(tables: Collection[str], revision: str | None) -> str | None:
    """At which revision of DATA_HISTORY tables are that older code made, which gave them no version table of their own.

    `tables`: the names of what is there. `revision`: what `alembic_version` says, which stood for these tables too.
    None: there are no such tables.
    """
    if "batch_checkpoints" not in tables:
        return None
    if "batch_quarantine" in tables:
        return "data_0003"
    return "data_0001" if revision == "app_0002" else "data_0002"


DATA_HISTORY = History(_HERE / "migrations", "batch_data_alembic_version", data_revision)
"""Our tables beside the authors' data."""

APPLICATION_HISTORIES = (*([History(_CLONES, "alembic_version")] if _CLONES.is_dir() else []), DATA_HISTORY)
"""All migrations of the application's database that are executed here.

A clone has an application of its own (service/application), whose migrations come first. The installed package has
none: there `alembic_version` belongs to the application that the package is installed into.
"""
