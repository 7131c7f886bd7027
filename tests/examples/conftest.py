"""The examples are the tasks folder, and each test runs on both databases."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(params=["sqlite", "postgresql"])
def batch_database(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def examples_as_tasks(own_world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKS_DIR", str(ROOT / "examples"))
