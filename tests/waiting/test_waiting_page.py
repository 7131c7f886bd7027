"""The examples of docs/waiting.md, as an author copies them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs_blocks import blocks, read
from tests.testing.test_plugin import preloaded_pytest as preloaded_pytest
from tests.testing.test_plugin import take

ROOT = Path(__file__).parent.parent.parent


def test_the_examples_of_the_page_succeed(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(
        pytester,
        monkeypatch,
        "tasks/sales.py",
        "tests/test_waiting.py",
        page=ROOT / "docs/waiting.md",
    )
    pytester.runpytest_subprocess("-q").assert_outcomes(passed=3)


def test_each_other_block_of_the_page_is_python() -> None:
    for block in blocks(read("docs/waiting.md"), "python"):
        compile(
            f"async def example():\n    {block.code.replace(chr(10), chr(10) + '    ')}",
            "page",
            "exec",
        )
