"""The examples of docs/partitions.md, as an author copies them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.testing.test_plugin import preloaded_pytest as preloaded_pytest
from tests.testing.test_plugin import take

ROOT = Path(__file__).parent.parent.parent


def test_the_examples_of_the_page_succeed(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(
        pytester,
        monkeypatch,
        "tasks/reprice.py",
        "tests/test_reprice.py",
        page=ROOT / "docs/partitions.md",
    )
    pytester.runpytest_subprocess("-q").assert_outcomes(passed=3)
