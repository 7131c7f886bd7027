from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from service.config import forget_settings


@pytest.fixture
def use_database(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a URL the application's database."""

    def use(url: str) -> None:
        monkeypatch.setenv("DATABASE_URL", url)
        forget_settings()

    return use


@pytest.fixture
def app_db(tmp_path: Path) -> Path:
    """Where the application's SQLite database is by default; the test makes it."""
    return tmp_path / "app.db"


@pytest.fixture
def database(postgres_database: str, use_database: Callable[[str], None]) -> str:
    """An empty PostgreSQL database, which is the application's."""
    use_database(postgres_database)
    return postgres_database
