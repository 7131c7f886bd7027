"""The structure of a page as text: its elements, what they say, and their states, without colours
and positions.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"input", "meta", "link", "br", "img", "hr", "wbr"}
SHOWN = (
    "id",
    "name",
    "type",
    "value",
    "href",
    "action",
    "role",
    "aria-label",
    "aria-current",
    "aria-pressed",
    "data-say",
)
FLAGS = ("required", "disabled", "checked", "selected", "hidden", "open", "autofocus")
HAS_STATE = ("chip", "note", "verdict", "attention")
"""Classes that say a state."""
SECRET = {"csrf", "key", "preview"}
"""Fields whose value is another one each time."""
MOST_ALIKE = 6
"""Of so many rows of a list the outline has each, of the others only their number."""
DECORATION = "i"
ROWS = {"tr", "li", "article", "g", "option"}


class Outline(HTMLParser):
    """Reads the contents of `main`."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._open: list[str] = []
        self._drawn = 0
        self._counts: list[int] = [0]
        self._left_out = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if not self._open and tag != "main":
            return
        if tag == "svg" or self._drawn:
            if not self._drawn and given.get("aria-label"):
                self._say(f"svg: {given['aria-label']}")
            self._drawn += tag not in VOID
            return
        if tag == DECORATION:
            return
        is_row = tag in ROWS
        self._counts[-1] += is_row
        if self._left_out or (is_row and self._counts[-1] > MOST_ALIKE):
            self._left_out += tag not in VOID
            return
        self._say(" ".join([tag, *self._attributes(given)]))
        if tag not in VOID:
            self._open.append(tag)
            self._counts.append(0)

    def handle_endtag(self, tag: str) -> None:
        if tag == DECORATION:
            return
        if self._drawn:
            self._drawn -= 1
        elif self._left_out:
            self._left_out -= 1
        elif self._open:
            self._open.pop()
            rows = self._counts.pop() - MOST_ALIKE
            if rows > 0:
                self.lines.append("  " * (len(self._open) + 1) + f"… {rows} more")

    def handle_data(self, data: str) -> None:
        text = " ".join(data.split())
        if text and self._open and not self._drawn and not self._left_out:
            # Each version of Python writes its own tracebacks.
            shown = "…" if "pre" in self._open else text
            self.lines.append("  " * len(self._open) + f"“{shown}”")

    def _say(self, what: str) -> None:
        self.lines.append("  " * len(self._open) + what)

    def _attributes(self, given: dict[str, str | None]) -> list[str]:
        classes = (given.get("class") or "").split()
        states = [f".{'.'.join(classes)}"] if classes and classes[0] in HAS_STATE else []
        hidden = {"value"} if given.get("name") in SECRET else set()
        shown = [
            f"{name}={given[name]}" for name in SHOWN if given.get(name) and name not in hidden
        ]
        return [*states, *shown, *(flag for flag in FLAGS if flag in given)]


def outline(html: str) -> str:
    """The outline of a page."""
    # A long table leaves out the end tags of its cells and rows.
    html = re.sub(r"(<td>[^<]*)(?=<t[dr]>|</tbody>)", r"\1</td>", html)
    html = re.sub(r"</td>(?=<tr>|</tbody>)", "</td></tr>", html)
    reader = Outline()
    reader.feed(html)
    reader.close()
    return "\n".join(reader.lines) + "\n"
