"""Errors without the values that a statement was given: they end up in logs, in the ledger, and at Sentry."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sqlalchemy.engine import ExceptionContext

SHORTEST = 4
"""A bound text of so many characters is taken out wherever it stands; a shorter one may be a part of other words."""

MOST_VALUES = 10_000

_DETAIL = re.compile(r"\nDETAIL: .*?(?=\nHINT: |\Z)", re.DOTALL)
_ARGUMENT = re.compile(
    r"(invalid input for query argument \$\d+(?: in element #\d+ of executemany\(\) sequence)?): .*", re.DOTALL
)
_IN_QUOTES = re.compile(r'"[^"]*"')


def hide_values(context: ExceptionContext) -> None:
    """For the engine's `handle_error` event, on every exception that says why.

    `hide_parameters` is not enough: a server's DETAIL has the values of a key or of a row, its errors about data (class
    22) quote what was wrong, and so does asyncpg where an argument does not fit.
    """
    values, errors = list(_texts(context.parameters)), _chain(context.sqlalchemy_exception, context.original_exception)
    quotes_data = any(map(_quotes_data, errors))
    for error in errors:
        if error.args and isinstance(error.args[0], str):
            error.args = (_without(error.args[0], values, quotes_data), *error.args[1:])
        if isinstance(getattr(error, "detail", None), str):  # asyncpg adds it to the text
            error.detail = None  # type: ignore[attr-defined]


def without_data(error: BaseException, text: str) -> str:
    """`text`, which says what this error is, without what a server's error about data quotes of it."""
    return _IN_QUOTES.sub('"…"', text) if _quotes_data(error) else text


def _quotes_data(error: BaseException) -> bool:
    return str(getattr(error, "sqlstate", None) or "").startswith("22")


def _without(text: str, values: list[str], quotes_data: bool) -> str:
    text = _ARGUMENT.sub(r"\1, which does not fit its type", _DETAIL.sub("", text))
    for value in values:
        text = text.replace(value, "…")
    return _IN_QUOTES.sub('"…"', text) if quotes_data else text


def _texts(parameters: Any) -> Iterator[str]:
    """The texts among the values of one statement, or of as many as were executed together; the longest first."""
    waiting, seen, found = [parameters], 0, set()
    while waiting and seen < MOST_VALUES:
        value = waiting.pop()
        seen += 1
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
        elif isinstance(value, str) and len(value) >= SHORTEST:
            found.add(value)
    yield from sorted(found, key=len, reverse=True)


def _chain(*errors: BaseException | None) -> list[BaseException]:
    """These, and what they were raised from or while."""
    found: list[BaseException] = []
    waiting = list(errors)
    while waiting:
        error = waiting.pop()
        if error is not None and not any(error is other for other in found):
            found.append(error)
            waiting += [error.__cause__, error.__context__]
    return found
