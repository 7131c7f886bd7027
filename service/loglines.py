"""Log lines as text: what is logged is settled at once, since it is rendered later and elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import traceback
from collections.abc import Mapping
from typing import Any, cast

from structlog.typing import EventDict

_OWN_KEYS = {"event", "level", "logger", "exc_info", "stack"}


def line(event: Mapping[str, Any]) -> str:
    """Message and key=value pairs, without the traceback."""
    pairs = (f"{key}={plain(value)!r}" for key, value in event.items() if key not in _OWN_KEYS)
    stack = f"\n{event['stack']}" if "stack" in event else ""
    return " ".join([str(event.get("event", "")), *pairs]) + stack


def failure(given: Any) -> BaseException | None:
    """What `exc_info=` means: an exception, stdlib's tuple, or True for the one that is being handled."""
    if given and not isinstance(given, BaseException | tuple):
        given = sys.exc_info()
    if isinstance(given, tuple):
        given = given[1]
    return given if isinstance(given, BaseException) else None


def plain(value: Any, depth: int = 5) -> Any:
    """A copy: the line is rendered later, in another thread, while the author's code goes on with its objects."""
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    try:
        if depth and isinstance(value, dict):
            return {str(key): plain(item, depth - 1) for key, item in value.items()}
        if depth and isinstance(value, list | tuple | set | frozenset):
            return [plain(item, depth - 1) for item in value]
        return str(value)
    except Exception:  # noqa: BLE001 - an author's __str__ may raise anything
        return f"<{type(value).__name__} without a text>"


class Settled(dict[str, Any]):
    """An event that reads as its line where a handler is not ours."""

    def __str__(self) -> str:
        return line(self)


def settle(record: logging.LogRecord) -> None:
    """Leave nothing in the record that may change before it is rendered."""
    if hasattr(record, "_logger"):  # structlog's
        event: dict[str, Any] = {**cast(EventDict, record.msg)}
        error = failure(event.pop("exc_info", None))
        settled = {key: plain(value) for key, value in event.items()}
        record.msg = Settled(settled, exc_info=error) if error else Settled(settled)
        record.exc_info = (type(error), error, error.__traceback__) if error else None
        return
    try:
        record.msg = record.getMessage()
    except Exception as error:  # noqa: BLE001 - stdlib would not let it out either
        record.msg = f"{plain(record.msg)} {plain(record.args)} ({type(error).__name__}: they don't fit together)"
    if record.stack_info:
        record.msg, record.stack_info = f"{record.msg}\n{record.stack_info}", None
    record.args = None
    for rendered in ("message", "asctime"):  # left there by another handler's formatter
        vars(record).pop(rendered, None)


def text(record: logging.LogRecord) -> str:
    """The settled line as the ledger keeps it, with its traceback."""
    if isinstance(record.msg, dict):
        return with_traceback(line(record.msg), record.msg.get("exc_info"))
    return with_traceback(record.msg, failure(record.exc_info))


def with_traceback(text: str, error: BaseException | None) -> str:
    return f"{text}\n{''.join(traceback.format_exception(error)).rstrip()}" if error else text
