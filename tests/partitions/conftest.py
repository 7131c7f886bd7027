"""Fixtures for the tests of partitioned tasks: the testing kit, on both databases."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["sqlite", "postgresql"])
def batch_database(request: pytest.FixtureRequest) -> str:
    return str(request.param)
