"""Which tests `make test` runs: those of the first file that docs/promises.md names for each
promise, and those of ALSO. All others get the mark `rest`, as do single tests that carry it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROMISES = ROOT / "docs/promises.md"
FIRST_OF_ROW = re.compile(r"^\|.*?`(tests/[\w/]+\.py)`", re.MULTILINE)
ALSO = {
    "tests/pages/test_pages.py",
    "tests/test_architecture.py",
    "tests/cli/test_cli.py",
    "tests/docs/test_contributing.py",
    "tests/docs/test_docs.py",
    "tests/docs/test_front.py",
    "tests/test_stored.py",
    "tests/test_words.py",
    "tests/testing/test_kit.py",
}
"""The shape of the project, its documents, and each of its doors."""


@functools.cache
def files() -> set[str]:
    """The files that `make test` runs."""
    return {*FIRST_OF_ROW.findall(PROMISES.read_text()), *ALSO}


def leave_the_others_to_rest(items: Iterable[pytest.Item]) -> None:
    """Give the mark `rest` to the tests of all other files."""
    first = files()
    for item in items:
        if item.location[0] not in first:
            item.add_marker(pytest.mark.rest)


def is_left_out(file: Path, expression: str) -> bool:
    """Whether no test of this file is asked for by `-m` with this expression, because all have the
    mark `rest`.
    """
    is_test = file.name.startswith("test_") and file.is_relative_to(ROOT)
    return "not rest" in expression and is_test and str(file.relative_to(ROOT)) not in files()
