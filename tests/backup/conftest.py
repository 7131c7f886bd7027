from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from service.config import forget_settings


@pytest.fixture(autouse=True)
def in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make backups in a thread, which is faster. Tests about the process use the fixture `in_a_process`."""
    monkeypatch.setenv("BACKUP_PROCESS", "0")
    forget_settings()


@pytest.fixture
def in_a_process(in_a_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make backups in a process of their own, as by default."""
    monkeypatch.delenv("BACKUP_PROCESS")
    forget_settings()


@pytest.fixture
def use_database(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that sets the URL of the application's database."""

    def use(url: str) -> None:
        monkeypatch.setenv("DATABASE_URL", url)
        forget_settings()

    return use


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that sets settings by their names."""

    def change(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        forget_settings()

    return change


@pytest.fixture
def app_db(tmp_path: Path) -> Path:
    """The default path of the application's SQLite database. The test creates the file."""
    return tmp_path / "app.db"


@pytest.fixture
def database(postgres_database: str, use_database: Callable[[str], None]) -> str:
    """The URL of an empty PostgreSQL database, which is set as the application's."""
    use_database(postgres_database)
    return postgres_database


@pytest.fixture(scope="session")
def migrated_files() -> None:
    """Tests of backups create their databases themselves."""
