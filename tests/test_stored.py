"""The document of the HTTP API and the help of all commands change only if that is intended."""

from __future__ import annotations

import pytest

from tests.stored import FOLDER, MADE


@pytest.mark.parametrize("file", MADE)
def test_it_is_as_it_is_stored(file: str) -> None:
    assert MADE[file]() == (FOLDER / file).read_text(), "if this is meant: python -m tests.stored"
