"""The files that pages need beside their HTML: styles, scripts, fonts. Their names change with
their contents.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

STATIC = Path(__file__).parents[1] / "static"
STYLES = (
    "tokens.css",
    "base.css",
    "components.css",
    "night.css",
    "phone.css",
    "tasks.css",
    "task.css",
    "incidents.css",
    "forecast.css",
    "changes.css",
    "runs.css",
    "command.css",
    "print.css",
)
"""The style sheets, which are sent as one in this order."""
SCRIPTS = ("signin.js", "zone.js")
HTMX = ("vendor/htmx.min.js", "vendor/hx-sse.min.js")
"""htmx and its extension for live updates, which are sent as one: htmx reads the page as soon as
htmx has loaded, and an extension that loads after that would never connect.
"""
MODULE = ("time.js", "live.js", "dialog.js", "log.js", "choose.js", "command.js", "keys.js")
"""The scripts of the pages, which are sent as one module in this order, because they share
names.
"""
ICONS = tuple(sorted(each.stem for each in (STATIC / "icons").glob("*.svg")))
"""The icons, which are sent as one picture in this order, each 24 units wide."""
FONTS = ("fonts/inter.woff2", "fonts/mono.woff2")
TYPES = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "woff2": "font/woff2",
    "svg": "image/svg+xml",
}
_INNER = re.compile(r"<svg[^>]*>(.*)</svg>", re.DOTALL)
_IN_STYLE = re.compile(r"url\(([a-z0-9_./-]+)\)")


@dataclass(frozen=True)
class Asset:
    """A file as it is sent. `packed`: compressed with gzip; None for formats that are compressed
    already.
    """

    media_type: str
    content: bytes
    packed: bytes | None


@dataclass(frozen=True)
class Assets:
    """`by_name`: each file under the name that its content has given it. `names`: that name for
    each plain one.
    """

    by_name: Mapping[str, Asset]
    names: Mapping[str, str]


@cache
def assets() -> Assets:
    """All files. They are read and packed once in a process: call it in a thread."""
    by_name: dict[str, Asset] = {}
    names: dict[str, str] = {}

    def add(name: str, content: bytes) -> None:
        stem, _, ending = Path(name).name.rpartition(".")
        named = f"{stem}.{hashlib.sha256(content).hexdigest()[:12]}.{ending}"
        packed = None if ending == "woff2" else gzip.compress(content, 9, mtime=0)
        by_name[named] = Asset(TYPES[ending], content, packed)
        names[name] = named

    for name in (*FONTS, *SCRIPTS, "icon.svg", "logo.svg"):
        add(name, (STATIC / name).read_bytes())
    add("icons.svg", _icons().encode())
    places = (f".i-{name}{{--i:{n / (len(ICONS) - 1):.5f}}}" for n, name in enumerate(ICONS))
    style = "\n".join(
        [
            *((STATIC / name).read_text() for name in STYLES),
            *places,
            f":root{{--icons:{len(ICONS)}}}",
        ]
    )
    add("pages.css", _IN_STYLE.sub(lambda found: f"url({names[found[1]]})", style).encode())
    for name, sources in (("htmx.js", HTMX), ("pages.js", MODULE)):
        add(name, "\n".join((STATIC / source).read_text() for source in sources).encode())
    return Assets(by_name, names)


def _icons() -> str:
    """All icons side by side. Styles cut each of them out, and give it the colour of its text."""
    drawn = []
    for number, name in enumerate(ICONS):
        found = _INNER.search((STATIC / "icons" / f"{name}.svg").read_text())
        assert found is not None, name
        drawn.append(f'<g transform="translate({24 * number})">{" ".join(found[1].split())}</g>')
    size = f'width="{24 * len(ICONS)}" height="24" viewBox="0 0 {24 * len(ICONS)} 24"'
    look = 'fill="none" stroke="#000" stroke-width="1.9" stroke-linecap="round"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {look} stroke-linejoin="round">'
        f"{''.join(drawn)}</svg>"
    )
