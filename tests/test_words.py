"""Each state, kind of incident and change has its words, and what they name on a page is there."""

from __future__ import annotations

import pytest
from rich.style import Style

from batch_system import words
from batch_system.batch.ledger.states import IncidentKind, RunState
from batch_system.operations.night.night import CHANGES
from batch_system.pages.frame.assets import STATIC

WITHOUT_ICON = {"service.deploy", "service.start", "settings.change", "schedule.change"}
"""Changes whose line is made by hand, with what has changed."""


def test_each_state_and_kind_has_its_words() -> None:
    assert words.STATES.keys() == set(RunState)
    assert words.INCIDENTS.keys() == set(IncidentKind)
    assert words.EVENTS.keys() >= set(CHANGES) - WITHOUT_ICON


@pytest.mark.parametrize("state", words.ICONS)
def test_the_style_of_each_state_is_in_the_style_sheets(state: str) -> None:
    sheets = "".join(path.read_text() for path in STATIC.glob("*.css"))
    assert f".k-{state}" in sheets


def test_icons_and_styles_are_there() -> None:
    icons = [*words.ICONS.values(), *(word.icon for word in words.EVENTS.values())]
    assert [name for name in icons if not (STATIC / "icons" / f"{name}.svg").exists()] == []
    for style in words.STYLES.values():
        Style.parse(style)
