from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from batch_system.backup.making import create
from batch_system.config import forget_settings
from tests.backup.here import in_a_process as in_a_process_of_its_own
from tests.backup.here import make_backups_here


@pytest.fixture(autouse=True)
def in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make backups in a thread, which is faster. Tests about the process use the fixture
    `in_a_process`.
    """
    make_backups_here(monkeypatch)


@pytest.fixture
def in_a_process(in_a_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make backups in a process of their own, as by default."""
    monkeypatch.setattr(create, "run_worker", in_a_process_of_its_own)


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
