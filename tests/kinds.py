"""What has no SQL of its own, such as pages, endpoints and commands, is tested on one kind of
database by `make test`.

The tests alternate, so each file uses both kinds. `make nightly` runs them on the other one too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import pytest

KINDS = ("sqlite", "postgresql")
ON_ONE = (
    "tests/pages/",
    "tests/web/test_access.py",
    "tests/web/test_live.py",
    "tests/web/test_metrics.py",
)
ON_ONE += (
    "tests/web/test_remote.py",
    "tests/cli/test_access.py",
    "tests/cli/test_manage.py",
    "tests/cli/test_runs.py",
)
ON_ONE += ("tests/examples/", "tests/dask/test_faults.py")
ON_BOTH = {
    "test_a_page_is_shown_to_its_role_and_to_no_lower_one",
    "test_night_adds_up_and_failures_are_retried_by_a_trial",
}
"""Of those files: every page is read on both, and one way through the pages in a browser is taken
on both.
"""


def leave_half_to_nightly(items: Iterable[pytest.Item]) -> None:
    """Give each second of these tests the mark `nightly` for the one kind, and each first for the
    other.
    """
    tests: dict[str, dict[str, dict[str, pytest.Function]]] = defaultdict(lambda: defaultdict(dict))
    for item in items:
        if isinstance(item, pytest.Function) and (kind := _kind_of(item)):
            others = [part for part in item.callspec.id.split("-") if part != kind]
            tests[item.location[0]][f"{item.originalname} {others}"][kind] = item
    for file in tests.values():
        for number, of_kind in enumerate(
            of_kind for of_kind in file.values() if len(of_kind) == len(KINDS)
        ):
            of_kind[KINDS[number % 2]].add_marker(pytest.mark.nightly)


def _kind_of(item: pytest.Function) -> str | None:
    """The kind of database that the test is for; None if it runs on both, whatever that is."""
    is_meant = item.location[0].startswith(ON_ONE) and item.originalname not in ON_BOTH
    if not is_meant or not hasattr(item, "callspec") or item.get_closest_marker("nightly"):
        return None
    found = [value for value in item.callspec.params.values() if value in KINDS]
    return found[0] if len(found) == 1 else None
