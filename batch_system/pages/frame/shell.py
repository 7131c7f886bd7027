"""What is around the contents of each page: navigation, the strip of nodes, the choice of zone and
colours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode

from batch_system.operations.system import nodes
from batch_system.operations.system.nodes import Around
from batch_system.pages.frame.viewer import Viewer
from batch_system.words import ICONS

PAGES = (
    ("night", "Night", "/"),
    ("incidents", "Incidents", "/incidents"),
    ("tasks", "Tasks", "/tasks"),
    ("runs", "Runs", "/runs"),
    ("changes", "Changes", "/changes"),
    ("backups", "Backups", "/backups"),
    ("nodes", "Nodes", "/nodes"),
)
LIVE = {"/": "night", "/tasks": "tasks", "/runs": "runs"}
"""The pages whose parts change while they are open, and their topics."""


class Tab(NamedTuple):
    """A part of a list, which a link above it shows. `number`: of its rows, as text; empty if it is
    not known.
    """

    label: str
    address: str
    number: str
    is_current: bool


@dataclass(frozen=True)
class LiveViewer(Viewer):
    """A viewer for whom only these blocks are rendered: for all viewers who see the same page, or
    for one who requests a block.
    """

    parts: tuple[str, ...] = ()


def only(viewer: Viewer, block: str) -> LiveViewer:
    """The same viewer, for whom only one block of the page is rendered."""
    return LiveViewer(**vars(viewer), parts=(block,))


async def shell_of(viewer: Viewer, current: str, title: str) -> dict[str, Any]:
    """The values that the layout needs. `current`: the name of the page in the navigation."""
    is_whole = not isinstance(viewer, LiveViewer)
    around = await nodes.around(viewer.operations.context) if is_whole else Around([], [])
    return {
        "viewer": viewer,
        "root": viewer.root,
        "here": viewer.here,
        "theme": viewer.theme,
        "pages": PAGES,
        "current": current,
        "title": title,
        "around": around,
        "icons": ICONS,
        "base": "layout.html" if is_whole else "parts.html",
        "live": _live(viewer.here),
    }


def _live(here: str) -> str:
    """The query of the stream that keeps this page up to date. A night that is over does not
    change.
    """
    path, _, query = here.partition("?")
    topic = LIVE.get(path, "nodes")
    given = [
        (name, value) for name, value in parse_qsl(query) if name not in ("topic", "after_line")
    ]
    if topic == "nodes" or (topic == "night" and any(name == "until" for name, _ in given)):
        return "topic=nodes"
    return urlencode([("topic", topic), *given])
