"""Many marks of one style as one path, because a night has hundreds of slots that went well.

A path is drawn in a box that is WIDTH units wide and is stretched to the width of its chart, so x
in percent becomes hundredths of a percent, while y stays in pixels. A mark that has no outline is a
line which is as thick as the mark is high, or wide.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeVar

WIDTH = 10_000
BAR_HEIGHT = 13
"""Of a run's bar in a lane, in pixels."""
NARROW = 1.0
"""A bar that is narrower has neither a hatch nor round corners, in percent."""
PLAIN = frozenset({"bar-succeeded", "cell-succeeded", "h-ok", "s-exp", "f-skipped"})
"""The styles of what went well, of what is to come, and of what was chosen not to run. Boxes of
these styles have no words of their own, so they can be one path.
"""
FLAT = 2.0
"""A box that is no higher is a line from left to right, in pixels."""
FEWEST = 4
"""So many marks are a line with dashes."""
TOLERANCE = 1.0
"""By how much a mark may be moved for it, in units: a tenth of a pixel."""
OUTLINED = frozenset({"h-ok", "s-exp", "bar-skipped"})


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


class Drawn(NamedTuple):
    """A path with its style. `thickness`: of its lines; None if it is an outline or dots. `dashes`:
    how long each of its marks is, and each gap.
    """

    css: str
    path: str
    thickness: str | None = None
    dashes: str | None = None


@dataclass(frozen=True)
class Told:
    """Marks that have words of their own. `href`: where they lead to. `middles`: in percent."""

    paths: Sequence[Drawn]
    title: str
    href: str
    middles: Sequence[float]


@dataclass
class ToldMarks:
    """Such marks of one style, one after another. `bottom`: in pixels."""

    css: str
    thickness: str
    bottom: float
    marks: list[Told] = field(default_factory=list)


class Pen:
    """Writes a path: each move from where the pen is, or from the corner, whichever is shorter."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._x = self._tenths = 0

    def move(self, x: int, y: float) -> None:
        """Go to a place. x in units, y in pixels."""
        tenths = round(y * 10)
        self._parts.append(_moved(x - self._x, tenths - self._tenths, x, tenths))
        self._x, self._tenths = x, tenths

    def dot(self) -> None:
        """Its style has a stroke with round ends, which is as wide as the dot."""
        self._parts.append("z")

    def right(self, units: int) -> None:
        """Draw a line to the right."""
        self._parts.append(f"h{units}")
        self._x += units

    def up(self, height: float) -> None:
        """Draw a line upwards."""
        tenths = round(height * 10)
        self._parts.append(_vertically(-tenths, self._tenths - tenths))
        self._tenths -= tenths

    def box(self, width: int, height: float) -> None:
        """Draw a rectangle upwards and to the right, and come back to its corner."""
        tenths = round(height * 10)
        self._parts.append(f"v{_tenths(-tenths)}h{width}v{_tenths(tenths)}z")

    def drawn(self) -> str:
        """The path."""
        return "".join(self._parts)


class Paths:
    """The paths of a chart, by their style, in the order in which the styles came.

    `is_upright`: its lines go upwards and are as thick as a box is wide. `width`: of the box in
    which they are drawn, in units.
    """

    def __init__(self, is_upright: bool = False, width: int = WIDTH) -> None:
        self._is_upright, self._width = is_upright, width
        self._pens: dict[tuple[str, str | None], Pen] = {}
        self._rows: dict[tuple[str, str, float], list[tuple[float, float]]] = {}
        self.told: list[ToldMarks] = []

    def add_box(self, box: Rectangle, y: float, height: float) -> None:
        """Add a rectangle; y and height in pixels."""
        if box.css in OUTLINED:
            pen = self.pen(box.css, None)
            pen.move(self._units(box.x), y + height)
            pen.box(self._across(box), height)
        elif self._is_upright and height > FLAT:
            self._line(self.pen(box.css, self._thickness(box, height)), box, y, height)
        else:
            key = (box.css, f"{height:g}", y + height / 2)
            self._rows.setdefault(key, []).append(self._place(box))

    def with_plain(self, boxes: Iterable[BoxT]) -> list[BoxT]:
        """Add those of these boxes whose style is in PLAIN. Returns the others."""
        others = []
        for box in boxes:
            if box.css in PLAIN:
                self.add_box(box, box.y, box.height)
            else:
                others.append(box)
        return others

    def tell(
        self, boxes: Sequence[tuple[Rectangle, float, float]], title: str, href: str = ""
    ) -> None:
        """Add boxes of one style, which have the same words. Each is given with its y and its
        height.
        """
        first, y, height = boxes[0]
        kind = (first.css, self._thickness(first, height), 0 if self._is_upright else y + height)
        if not self.told or kind != (
            (last := self.told[-1]).css,
            last.thickness,
            last.bottom,
        ):
            self.told.append(ToldMarks(*kind))
        if self._is_upright:
            pen = Pen()
            for box, top, high in boxes:
                self._line(pen, box, top, high)
            drawn = [Drawn(first.css, pen.drawn())]
        else:
            drawn = _row(first.css, "", y + height / 2, [self._place(box) for box, _, _ in boxes])
        middles = [round(box.x + box.width / 2, 2) for box, _, _ in boxes]
        self.told[-1].marks.append(Told(drawn, title, href, middles))

    def add_dot(self, css: str, x: float, y: float) -> None:
        """Add a dot."""
        pen = self.pen(css, None)
        pen.move(self._units(x), y)
        pen.dot()

    def drawn(self) -> list[Drawn]:
        """For each style its path."""
        rows = [
            each
            for (css, thickness, y), some in self._rows.items()
            for each in _row(css, thickness, y, some)
        ]
        return [
            *(Drawn(css, pen.drawn(), thick) for (css, thick), pen in self._pens.items()),
            *rows,
        ]

    def pen(self, css: str, thickness: str | None) -> Pen:
        """The pen of a style. `thickness`: as `Drawn` has it."""
        if (pen := self._pens.get((css, thickness))) is None:
            pen = self._pens[css, thickness] = Pen()
        return pen

    def _line(self, pen: Pen, box: Rectangle, y: float, height: float) -> None:
        pen.move(self._units(box.x + box.width / 2), y + height)
        pen.up(height)

    def _place(self, box: Rectangle) -> tuple[float, float]:
        return box.x * self._width / 100, box.width * self._width / 100

    def _thickness(self, box: Rectangle, height: float) -> str:
        return f"{box.width * self._width / 100 if self._is_upright else height:.3g}"

    def _across(self, box: Rectangle) -> int:
        return max(1, self._units(box.width))

    def _units(self, percent: float) -> int:
        return round(percent * self._width / 100)


def _row(css: str, thickness: str, y: float, places: list[tuple[float, float]]) -> list[Drawn]:
    """Lines at the same height, from x and as wide as `places` say, in units. Those that are alike
    and stand at equal distances are one line with dashes.
    """
    steps = sorted(round(b - a, 1) for (a, _), (b, _) in pairwise(places))
    step = steps[len(steps) // 2] if steps else 0.0
    if step > 0:
        number = round((places[-1][0] - places[0][0]) / step)
        step = (places[-1][0] - places[0][0]) / max(1, number)
    dashed, single, wide = Pen(), Pen(), places[len(places) // 2][1]
    rest = places
    while rest:
        count = _alike(rest, step, wide)
        (x, width), pen = rest[0], dashed if count >= FEWEST else single
        if count < FEWEST:
            count = 1
        pen.move(round(x), y)
        pen.right(max(1, round((count - 1) * step + width)))
        rest = rest[count:]
    dashes = f"{wide:.2f} {step - wide:.2f}"
    drawn = [(dashed.drawn(), dashes), (single.drawn(), None)]
    return [Drawn(css, path, thickness, dash) for path, dash in drawn if path]


def _alike(places: list[tuple[float, float]], step: float, wide: float) -> int:
    """How many of the first places are as wide as that, at equal distances."""
    begin = places[0][0]
    for number, (x, width) in enumerate(places):
        is_in_row = abs(begin + number * step - x) <= TOLERANCE
        if step <= wide or not is_in_row or abs(width - wide) > TOLERANCE:
            return number
    return len(places)


@lru_cache(4_096)
def _moved(right: int, down: int, x: int, tenths: int) -> str:
    near, far = _pair(right, down), _pair(x, tenths)
    return f"m{near}" if len(near) < len(far) else f"M{far}"


@lru_cache(4_096)
def _vertically(near: int, far: int) -> str:
    by, to = _tenths(near), _tenths(far)
    return f"v{by}" if len(by) < len(to) else f"V{to}"


@lru_cache(4_096)
def _tenths(value: int) -> str:
    whole, rest = divmod(abs(value), 10)
    digits = f"{whole or ''}.{rest}" if rest else str(whole)
    return f"-{digits}" if value < 0 else digits


def _pair(x: int, tenths: int) -> str:
    return f"{x}{_tenths(tenths)}" if tenths < 0 else f"{x} {_tenths(tenths)}"
