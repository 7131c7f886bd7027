"""How the states of runs are shown: an icon and a style for each."""

from __future__ import annotations

ICONS = {
    "waiting": "hourglass",
    "queued": "clock",
    "running": "loader-circle",
    "retrying": "rotate-cw",
    "interrupted": "unplug",
    "succeeded": "circle-check",
    "failed": "circle-x",
    "cancelled": "ban",
    "skipped": "skip-forward",
    "missed": "calendar-x",
}
STATES = tuple(state for state in ICONS if state != "missed")
ACTIVE = ("waiting", "queued", "running", "retrying", "interrupted")
