"""Renders templates. All text is escaped, and characters that could mislead a reader are made
visible first.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from batch_system import escaping
from batch_system.concurrency.offload import offload
from batch_system.pages.frame import formatting
from batch_system.pages.frame.assets import ICONS, assets
from batch_system.words import CHIPS, SUBJECTS, kept_back_parts

TEMPLATES = Path(__file__).parents[1] / "templates"
LONGEST_TEXT = 10_000
"""One value on a page has at most this many characters."""

LONGEST_SENTENCE = 300
"""A text in a line among others has at most this many characters."""

MOST_MARKS = 100
"""At most this many occurrences of what was searched for are marked in one text."""

LONGEST_LINES = 100_000
"""A text of several lines, such as a traceback, has at most this many characters."""


@cache
def environment() -> Environment:
    """The templates. Call it in a thread: it reads files."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    for name in ("number", "rate", "counted", "percent", "size", "duration", "instant"):
        made.filters[name] = getattr(formatting, name)
    made.filters |= {
        "lines": lines,
        "marked": marked,
        "tojson_text": json_text,
        "log_time": formatting.log_time,
        "shortened": lambda text: escaping.cut(text or "", LONGEST_SENTENCE),
    }
    made.filters["kept_parts"] = kept_back_parts
    made.filters["chip_word"] = lambda kind: CHIPS.get(kind, kind)
    made.filters["subject_word"] = lambda kind: SUBJECTS.get(kind, kind)
    made.globals |= {"icon": icon, "asset": assets().names.__getitem__, "formatting": formatting}
    return made


async def render(template: str, **values: Any) -> str:
    """The HTML of a template, made in a thread."""
    return await offload(_render, template, values)


def _render(template: str, values: dict[str, Any]) -> str:
    return environment().get_template(template).render(**values)


def _shown(value: Any) -> Any:
    """A value as it is put into a page: invisible and control characters of text are escapes such
    as `\\x1b`, and a number is a place in a drawing, for which two decimals are enough.
    """
    if type(value) is str and len(value) <= LONGEST_TEXT and value.isprintable():
        return value  # as nearly all are
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return escaping.line(escaping.brief(value, LONGEST_TEXT))


def lines(text: str) -> Markup:
    """Text of several lines, escaped like any other, which keeps its line feeds."""
    return escape(escaping.lines(escaping.brief(text, LONGEST_LINES)))


_COLOURS = re.compile(r"(?:\x1b|\\x1b)\[[0-9;]{0,20}m")


def marked(text: str, wanted: str | None = None) -> Markup:
    """Text of several lines, in which what was searched for is marked, whatever the case of its
    letters.

    Colours of a terminal are left out: they are escaped in the log, such as \\x1b[33m, and mean
    nothing here.
    """
    text = _COLOURS.sub("", text)
    if not wanted:
        return lines(text)
    shown = escaping.lines(escaping.brief(text, LONGEST_LINES))
    parts = re.split(f"({re.escape(wanted)})", shown, maxsplit=MOST_MARKS, flags=re.IGNORECASE)
    marks = (
        Markup("<mark>{}</mark>").format(part) if number % 2 else escape(part)
        for number, part in enumerate(parts)
    )
    return Markup("").join(marks)


def json_text(value: Any) -> str:
    """A value as JSON that people read."""
    return escaping.brief(escaping.to_json(value, default=str), LONGEST_TEXT)


@cache
def icon(name: str, css: str = "") -> Markup:
    """An icon, which has the colour of its text. Screen readers skip it."""
    assert name in ICONS, name
    return Markup(f'<i class="{f"i {css}".strip()} i-{name}"></i>')  # noqa: S704
