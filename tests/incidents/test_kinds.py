"""The kinds of incidents are the same wherever they are listed."""

from __future__ import annotations

from typing import get_args

from service.alerts import messages
from service.web.v1.incidents import KindName


def test_each_kind_that_is_told_can_be_asked_for_over_the_api() -> None:
    assert set(get_args(KindName)) == messages._TITLES.keys()
