"""The migrations of the ledger's tables."""

from pathlib import Path

from service.database.migrate import History

LEDGER_HISTORY = History(Path(__file__).parent / "migrations", "batch_alembic_version")
