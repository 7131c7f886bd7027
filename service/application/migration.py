"""The migrations of the application's database."""

from pathlib import Path

from service.database.migrate import History

APPLICATION_HISTORY = History(Path(__file__).parent / "migrations", "alembic_version")
