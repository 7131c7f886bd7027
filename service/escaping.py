"""Text from outside, fit for a terminal, a log or a message: nothing in it acts or hides, and it has an end.

A task's name, an error, a table's name in a backup: whoever wrote it may have put control characters into it, which
move a terminal's cursor, or marks that change the direction of what is read. Whatever is printed goes through here.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any

LONGEST_QUOTE = 80
"""So many characters of a value stand in a message."""

_NOT_PLAIN = re.compile(r"[^ -~]")


def line(text: str) -> str:
    """On one line: a line feed or a tab is a space. What acts or can't be seen is an escape, such as `\\x1b`."""
    return text if text.isprintable() else _NOT_PLAIN.sub(_visible, text)


def lines(text: str, indent: str = "") -> str:
    """The same with its line feeds. With an `indent` none of its later lines can pass for one that begins anew."""
    return f"\n{indent}".join(map(line, text.expandtabs().split("\n")))


def to_json(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """On one line. What would act in a terminal is escaped as JSON escapes it; other characters stay readable."""
    encoded = json.dumps(value, ensure_ascii=False, default=default)
    return encoded if encoded.isprintable() else _NOT_PLAIN.sub(_in_json, encoded)


def echoed(value: object, longest: int = LONGEST_QUOTE) -> str:
    """As Python writes a value, for a message; of a long one the beginning, and how long it is. Never raises."""
    if type(value) is str:
        is_long = len(value) > longest
        return f"{value[:longest]!r}… ({len(value):,} characters)" if is_long else repr(value)
    try:
        return cut(line(repr(value)), longest)
    except (Exception, SystemExit):  # noqa: BLE001 - an author's __repr__ may raise anything
        return f"<{type(value).__name__} without a text>"


def cut(text: str, longest: int) -> str:
    """Its first `longest` characters, and how long it was where that is more."""
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text):,} characters)"


def brief(text: str, longest: int = 100) -> str:
    """Its first `longest` characters, for a list or a sentence of many names."""
    return text if len(text) <= longest else f"{text[:longest]}…"


def _is_seen(char: str) -> bool:
    """Python counts no space but that of ASCII as printable, and Japanese text has a wide one."""
    return char.isprintable() or unicodedata.category(char) == "Zs"


def _visible(found: re.Match[str]) -> str:
    char = found[0]
    if _is_seen(char):
        return char
    return " " if char in "\n\t" else char.encode("unicode_escape").decode()


def _in_json(found: re.Match[str]) -> str:
    char = found[0]
    if _is_seen(char):
        return char
    units = char.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
