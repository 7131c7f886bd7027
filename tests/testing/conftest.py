from __future__ import annotations

import pytest

from tests.kinds import KINDS


@pytest.fixture(params=KINDS)
def batch_database(request: pytest.FixtureRequest) -> str:
    """The kit works the same on both."""
    return str(request.param)
