from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from service.config import forget_settings


@pytest.fixture(autouse=True)
def in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own for each backup takes most of a test's time: those that are about it ask for it."""
    monkeypatch.setenv("BACKUP_PROCESS", "0")
    forget_settings()


@pytest.fixture
def in_a_process(in_a_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is by default."""
    monkeypatch.delenv("BACKUP_PROCESS")
    forget_settings()


@pytest.fixture
def use_database(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a URL the application's database."""

    def use(url: str) -> None:
        monkeypatch.setenv("DATABASE_URL", url)
        forget_settings()

    return use


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets settings by their names."""

    def change(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        forget_settings()

    return change


@pytest.fixture
def app_db(tmp_path: Path) -> Path:
    """Where the application's SQLite database is by default; the test makes it."""
    return tmp_path / "app.db"


@pytest.fixture
def database(postgres_database: str, use_database: Callable[[str], None]) -> str:
    """An empty PostgreSQL database, which is the application's."""
    use_database(postgres_database)
    return postgres_database


@pytest.fixture(scope="session")
def migrated_files() -> None:
    """The tests of backups make the databases that they need."""
