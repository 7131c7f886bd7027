"""Text that controls a terminal, or hides in it, and text that must not be changed by escaping."""

from __future__ import annotations

import unicodedata

HOSTILE = {
    "ESC": "\x1b[2J",
    "colour": "\x1b[38;5;1m",
    "OSC": "\x1b]0;title\x07",
    "BEL": "\x07",
    "CR": "\r",
    "backspace": "\x08",
    "NUL": "\0",
    "DEL": "\x7f",
    "C1": "\x9b31m",
    "right to left": "\u202e",
    "isolate": "\u2067",
    "mark": "\u200f",
    "zero width": "\u200b",
    "byte order mark": "\ufeff",
    "line separator": "\u2028",
    "half a pair": "\ud800",
    "tag": "\U000e0041",
}
SEEN = "日本語　は残る é 😀"
"""What a person has to see as it is."""


def acts(char: str) -> bool:
    """Whether it misleads a terminal or a reader."""
    return char != "\n" and unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
