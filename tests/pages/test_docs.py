"""docs/pages.md has each page with its address, and each key."""

from __future__ import annotations

import re

from batch_system.pages.frame.assets import STATIC
from batch_system.pages.routes import routes
from tests.docs_blocks import read

ASKING = (
    *("pause", "resume", "mute", "retry", "cancel", "acknowledge", "redrive", "verify", "/end"),
    "/undo",
)
"""Pages that ask before something is done. They are opened by its button."""


def test_each_page_is_in_the_docs_with_its_address() -> None:
    paths = {
        re.sub(r"\{\w+\}", "*", route.path)
        for route in routes
        if "GET" in (getattr(route, "methods", None) or ())
        and route.path not in ("/live", "/static/{name}")
    }
    pages = {
        path for path in paths if not path.endswith((*ASKING, "log.txt", "/download", "/file"))
    }
    table = read("docs/pages.md").partition("## What you can do")[0]
    listed = re.findall(r"^\| [^|]+ \| `([^`]+)` \|", table, re.MULTILINE)
    assert {re.sub(r"\b(NAME|ID|NUMBER)\b", "*", address) for address in listed} == pages


def test_each_key_is_in_the_docs() -> None:
    (listed,) = re.findall(
        r"const LIST = \[(.*?)\n\];", (STATIC / "keys.js").read_text(), re.DOTALL
    )
    keys = {
        key.lower()
        for found in re.findall(r'\["([^"]+)", "[^"]+"\]', listed)
        for key in found.split()
    }
    table = read("docs/pages.md").partition("| key |")[2].partition("\n\n")[0]
    assert {key.lower() for key in re.findall(r"`(\S+)`", table)} == keys
