"""The history of the ledger: where its migrations are, and its tables about them."""

from pathlib import Path

from batch_system.database.migrate import History

LEDGER_HISTORY = History(
    Path(__file__).parent / "migrations", "batch_alembic_version", "batch_windows"
)
