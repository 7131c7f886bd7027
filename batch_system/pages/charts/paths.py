"""Many marks of one style as one path, because a night has hundreds of slots that went well.

A path is drawn in a box that is WIDTH units wide and is stretched to the width of its chart, so x
in percent becomes hundredths of a percent, while y stays in pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol, TypeVar

WIDTH = 10_000
BAR_HEIGHT = 13
"""Of a run's bar in a lane, in pixels."""
NARROW = 1.0
"""A bar that is narrower cannot be pointed at, in percent."""
PLAIN = frozenset({"bar-succeeded", "cell-succeeded", "h-ok", "s-exp", "f-skipped"})
"""The styles of what went well, of what is to come, and of what was chosen not to run. Boxes of
these styles have no words of their own, so they can be one path.
"""


class Rectangle(Protocol):
    """Has a place in percent, and a style."""

    @property
    def x(self) -> float: ...
    @property
    def width(self) -> float: ...
    @property
    def css(self) -> str: ...


class PlacedBox(Rectangle, Protocol):
    """Has its own y and height, too, in pixels."""

    @property
    def y(self) -> float: ...
    @property
    def height(self) -> float: ...


BoxT = TypeVar("BoxT", bound=PlacedBox)


class Paths:
    """The paths of a chart, by their style, in the order in which the styles came."""

    def __init__(self) -> None:
        self._parts: dict[str, list[str]] = {}

    def add_box(self, box: Rectangle, y: float, height: float) -> None:
        """Add a rectangle; y and height in pixels."""
        bottom = f"{round(y + height, 1):g}"
        width = max(1, _units(box.width))
        part = f"M{_units(box.x)} {bottom}V{y:g}h{width}V{bottom}z"
        self._parts.setdefault(box.css, []).append(part)

    def with_plain(self, boxes: Iterable[BoxT], also: Collection[str] = ()) -> list[BoxT]:
        """Add those of these boxes whose style is in PLAIN or in `also`. Returns the others."""
        others = []
        for box in boxes:
            if box.css in PLAIN or box.css in also:
                self.add_box(box, box.y, box.height)
            else:
                others.append(box)
        return others

    def has_taken(self, bar: Rectangle, y: float) -> bool:
        """Add a bar that is too narrow to be pointed at, if its style is in PLAIN."""
        is_taken = bar.css in PLAIN and bar.width < NARROW
        if is_taken:
            self.add_box(bar, y, BAR_HEIGHT)
        return is_taken

    def add_dot(self, css: str, x: float, y: float) -> None:
        """Add a dot. Its style has a stroke with round ends, which is as wide as the dot."""
        self._parts.setdefault(css, []).append(f"M{_units(x)} {y:g}h.1")

    def drawn(self) -> list[tuple[str, str]]:
        """For each style its path."""
        return [(css, "".join(parts)) for css, parts in self._parts.items()]


def _units(percent: float) -> int:
    return round(percent * WIDTH / 100)
