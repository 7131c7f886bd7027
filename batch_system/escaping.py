"""Makes text from outside safe for a terminal, a log or a message: escapes control characters, and
limits the length.

A task's name, an error or the name of a table in a backup may contain control characters that move
a terminal's cursor, or marks that change the direction of text. All text that is printed is escaped
here.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any

LONGEST_QUOTE = 80
"""Longest quotation of a value in a message, in characters."""
MOST_LEVELS = 64
"""How many levels deep the JSON of parameters may be nested. Readers in other languages have limits
too.
"""
MOST_ITEMS, LONGEST_ITEM = 50, 200

_NOT_PLAIN = re.compile(r"[^ -~]")


def line(text: str) -> str:
    """The text on one line: line feeds and tabs become spaces, and other invisible characters
    become escapes such as `\\x1b`.
    """
    return text if text.isprintable() else _NOT_PLAIN.sub(_visible, text)


def lines(text: str, indent: str = "") -> str:
    """The text, escaped like `line`, but with its line feeds. The later lines begin with
    `indent`.
    """
    return f"\n{indent}".join(map(line, text.expandtabs().split("\n")))


def cell(text: str) -> str:
    """A text as a cell of a CSV file. One that a spreadsheet would take for a formula begins with
    an apostrophe.
    """
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def to_json(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """JSON on one line. Invisible characters are JSON escapes, and all others are readable."""
    encoded = json.dumps(value, ensure_ascii=False, default=default)
    return encoded if encoded.isprintable() else _NOT_PLAIN.sub(_in_json, encoded)


def echoed(value: object, longest: int = LONGEST_QUOTE) -> str:
    """A value as its Python literal, for a message. A long one is cut, and its length is added.
    Never raises.
    """
    if type(value) is str:
        is_long = len(value) > longest
        return f"{value[:longest]!r}… ({len(value):,} characters)" if is_long else repr(value)
    try:
        return cut(line(repr(value)), longest)
    except (Exception, SystemExit):  # noqa: BLE001 - an author's __repr__ may raise anything
        return f"<{type(value).__name__} without a text>"


def cut(text: str, longest: int) -> str:
    """The first `longest` characters, followed by the number of all characters if there are
    more.
    """
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text):,} characters)"


def brief(text: str, longest: int = 100) -> str:
    """The first `longest` characters, followed by `…` if there are more."""
    return text if len(text) <= longest else f"{text[:longest]}…"


def is_deep(value: object, levels: int = MOST_LEVELS) -> bool:
    """Whether lists and objects of JSON are nested in `value` more than `levels` deep."""
    left = [(value, 0)]
    while left:
        each, level = left.pop()
        if isinstance(each, dict | list | tuple):
            if level == levels:
                return True
            left += [
                (item, level + 1) for item in (each.values() if isinstance(each, dict) else each)
            ]
    return False


def shortened(value: Any, longest: int) -> Any:
    """A JSON value for a long list: the beginning of a large value, as text, and of a large object
    the beginning of each of its values.
    """
    encoded = json.dumps(value, ensure_ascii=False)
    if len(encoded) <= longest and not is_deep(value):
        return value
    if not isinstance(value, dict):
        return cut(encoded, longest)
    items = list(value.items())[:MOST_ITEMS]
    return {
        brief(name): each
        if len(text := json.dumps(each, ensure_ascii=False)) <= LONGEST_ITEM
        else cut(text, LONGEST_ITEM)
        for name, each in items
    }


def _is_visible(char: str) -> bool:
    """Whether a character is printable or a space. `isprintable` is false for all spaces but the
    ASCII one.
    """
    return char.isprintable() or unicodedata.category(char) == "Zs"


def _visible(match: re.Match[str]) -> str:
    char = match[0]
    if _is_visible(char):
        return char
    return " " if char in "\n\t" else char.encode("unicode_escape").decode()


def _in_json(match: re.Match[str]) -> str:
    char = match[0]
    if _is_visible(char):
        return char
    units = char.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
