"""The filter of the list of runs, from the query of the page. Instants may be local times of the
viewer.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from batch_system.batch.ledger.states import ACTIVE
from batch_system.errors import InvalidParameters
from batch_system.pages.frame.formatting import moment
from batch_system.pages.frame.viewer import Viewer

FILTERS = (
    "task",
    "tag",
    "pool",
    "state",
    "origin",
    "parent",
    "param",
    "text",
    "fingerprint",
    "within",
    "since",
    "until",
    "created_since",
    "created_until",
    "slot_since",
    "slot_until",
)
WITHIN = {"1h": timedelta(hours=1), "24h": timedelta(hours=24), "7d": timedelta(days=7)}
"""The quick choices of when a run was made."""
LONGEST = 200
WORDS = {
    "within": "made in the last",
    "since": "made since",
    "until": "made before",
    "text": "reason with",
    "fingerprint": "error",
    "created_since": "made since",
    "created_until": "made before",
    "param": "parameter",
    "parent": "parts of run",
    "slot_since": "slots since",
    "slot_until": "slots before",
}


def given_in(query: Mapping[str, str]) -> dict[str, str]:
    """The conditions that are given, by name."""
    given = {name: value for name in FILTERS if (value := query.get(name, "").strip()[:LONGEST])}
    if given.keys() & {"since", "until"}:
        given.pop("within", None)  # a value that was entered overrides an earlier quick choice
    return given


def address(given: Mapping[str, str], **other: str) -> str:
    """The address of the page with the same filter but these conditions; an empty one is left
    out.
    """
    query = urlencode({name: value for name, value in {**given, **other}.items() if value})
    return f"/runs?{query}" if query else "/runs"


def conditions_of(given: Mapping[str, str], viewer: Viewer) -> dict[str, Any]:
    """The conditions of RunFilter. Raises InvalidParameters for a text that is not a time."""
    conditions: dict[str, Any] = {
        n: v for n, v in given.items() if n not in ("within", "since", "until")
    }
    if "param" in given:
        conditions["param"] = [given["param"]]
    if "state" in given:
        conditions["state"] = list(ACTIVE) if given["state"] == "active" else [given["state"]]
    if "origin" in given:
        conditions["origin"] = (
            ["schedule", "backfill"] if given["origin"] == "planned" else [given["origin"]]
        )
    for name in ("since", "until"):
        if name in given:
            conditions[f"created_{name}"] = _instant(name, given[name], viewer)
    if "within" in given:
        if given["within"] not in WITHIN:
            raise InvalidParameters(f"within: allowed are {', '.join(WITHIN)}")
        conditions["created_since"] = viewer.now - WITHIN[given["within"]]
    return conditions


def _instant(name: str, given: str, viewer: Viewer) -> datetime:
    """A local time of the viewer, such as 2026-10-25T02:30, or an instant with its offset."""
    try:
        found = datetime.fromisoformat(given)
        return (
            found if found.tzinfo is not None else found.replace(tzinfo=viewer.zone)
        ).astimezone(UTC)
    except (ValueError, OverflowError):
        raise InvalidParameters(f"{name}: allowed is a time such as 2026-10-25T02:30") from None


def words_of(given: Mapping[str, str], viewer: Viewer) -> str:
    """The filter in words."""
    parts = [
        f"{WORDS.get(name, name)} {_shown(name, value, viewer)}" for name, value in given.items()
    ]
    return ", ".join(parts) or "all runs"


def chips_of(given: Mapping[str, str], viewer: Viewer) -> list[tuple[str, str, str]]:
    """Each condition in force: its name, its value, and the address of the page without it."""
    return [
        (WORDS.get(name, name), _shown(name, value, viewer), address(given, **{name: ""}))
        for name, value in given.items()
    ]


def _shown(name: str, value: str, viewer: Viewer) -> str:
    """A value in words: instants in the zone of the viewer."""
    if not name.endswith(("since", "until")):
        return value
    return f"{moment(_instant(name, value, viewer), viewer.zone, viewer.now)} ({viewer.zone_name})"


_OPTIONS = {
    "state": "--state",
    "origin": "--origin",
    "task": "--task",
    "tag": "--tag",
    "pool": "--pool",
    "parent": "--parent",
    "param": "--param",
    "text": "--text",
    "fingerprint": "--fingerprint",
    "created_since": "--since",
    "created_until": "--until",
    "slot_since": "--slot-since",
    "slot_until": "--slot-until",
}


def command_of(conditions: Mapping[str, Any]) -> str:
    """The command that lists the same runs."""
    words = ["batch", "runs"]
    for name, value in conditions.items():
        for each in value if isinstance(value, list) else [value]:
            shown = each.isoformat() if isinstance(each, datetime) else str(each)
            words += [_OPTIONS[name], shlex.quote(shown)]
    return " ".join(words)
