"""Log lines as text: what is logged is settled at once, since it is rendered later and elsewhere.

It is bounded at once too: it may wait for a slow stderr, or for a ledger that is away, with many thousands of others.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from service import failures

LONGEST = 64_000
"""Bytes of a message or of a value, in UTF-8. Of a longer one the beginning is kept, and it says how much was cut."""

LONGEST_LINE = 100_000
"""Bytes of a message with its values and its traceback."""

MOST_DIGITS = 4_000
"""Python refuses to write a longer number."""

ITEM = 16
"""An item of a list counts as so many characters at least."""

OVERHEAD = 1_000
"""About how many bytes a record takes beside its texts."""

_MORE = "…"

_SIZED = {str, list, dict}

_RECORD_KEYS = vars(logging.makeLogRecord({})).keys() | {"message", "asctime", "taskName", "batch_stamp"}

_OWN_KEYS = {"event", "level", "logger", "exc_info", "stack"}


def line(settled: Mapping[str, Any]) -> str:
    """Message and key=value pairs, without the traceback."""
    pairs = (f"{key}={value!r}" for key, value in settled.items() if key not in _OWN_KEYS)
    stack = f"\n{settled['stack']}" if "stack" in settled else ""
    return " ".join([str(settled.get("event", "")), *pairs]) + stack


def failure(given: Any) -> BaseException | None:
    """What `exc_info=` means: an exception, stdlib's tuple, or True for the one that is being handled."""
    if given and not isinstance(given, BaseException | tuple):
        given = sys.exc_info()
    if isinstance(given, tuple):
        given = given[1]
    return given if isinstance(given, BaseException) else None


def bounded(text: str, longest: int = LONGEST) -> str:
    """So many bytes of it, and how many characters were cut. Of a long text no copy is made."""
    if len(text) <= longest // 4 or (text.isascii() and len(text) <= longest):
        return text
    kept = text[:longest].encode("utf-8", "replace")[:longest].decode("utf-8", "ignore")
    return kept if len(kept) == len(text) else f"{kept}... (cut: {len(text) - len(kept):,} more characters)"


def plain(value: Any) -> Any:
    """A copy: the line is rendered later, in another thread, while the author's code goes on with its objects."""
    kind = type(value)
    if value is None or kind is bool or (kind is float and math.isfinite(value)):
        return value
    if kind is str:
        return bounded(value)
    if kind is int:
        return value if value.bit_length() < 3 * MOST_DIGITS else f"<a number of {value.bit_length():,} bits>"
    return _Copy().of(value)


class _Copy:
    """Of one value, as far as LONGEST characters in all go. In the place of what comes after those is a `…`."""

    def __init__(self) -> None:
        self._left = LONGEST

    def of(self, value: Any, depth: int = 5) -> Any:
        try:
            if depth and isinstance(value, dict):
                pairs = self._first(value.items(), (_MORE, _MORE))
                return {self._text(key): self.of(item, depth - 1) for key, item in pairs}
            if depth and isinstance(value, list | tuple | set | frozenset):
                return [self.of(item, depth - 1) for item in self._first(value, _MORE)]
            if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):  # an IntEnum, say
                return plain(int.__int__(value) if isinstance(value, int) else float.__float__(value))
            return None if value is None else self._text(value)
        except Exception:  # noqa: BLE001 - an author's __str__ may raise anything
            return f"<{type(value).__name__} without a text>"

    def _first(self, items: Iterable[Any], last: Any) -> Iterator[Any]:
        for item in items:
            if self._left <= 0:
                yield last
                return
            self._left -= ITEM
            yield item

    def _text(self, value: Any) -> str:
        text = str.__str__(value) if isinstance(value, str) else str(value)
        left, self._left = max(0, self._left), self._left - len(text)
        return bounded(text if len(text) <= left else f"{text[:left]}{_MORE}")


def values_of(event: Mapping[str, Any]) -> dict[str, Any]:
    return {key: plain(value) for key, value in event.items()}


class Settled(dict[str, Any]):
    """An event that reads as its line where a handler is not ours."""

    def __str__(self) -> str:
        return line(self)


def settle(record: logging.LogRecord) -> None:
    """Leave nothing in the record that may change before it is rendered."""
    if hasattr(record, "_logger"):  # structlog's
        event: dict[str, Any] = dict(record.msg)  # type: ignore[arg-type]
        error = failure(event.pop("exc_info", None))
        settled = values_of(event)
        record.msg = Settled(settled, exc_info=error) if error else Settled(settled)
        record.exc_info = (type(error), error, error.__traceback__) if error else None
        return
    try:
        record.msg = bounded(record.getMessage())
    except Exception as error:  # noqa: BLE001 - stdlib would not let it out either
        record.msg = f"{plain(record.msg)} {plain(record.args)} ({type(error).__name__}: they don't fit together)"
    if record.stack_info:
        record.msg, record.stack_info = f"{record.msg}\n{record.stack_info}", None
    record.args = None
    for rendered in ("message", "asctime"):  # left there by another handler's formatter
        vars(record).pop(rendered, None)
    for name in vars(record).keys() - _RECORD_KEYS:  # of `extra=`
        setattr(record, name, plain(getattr(record, name)))


def text(record: logging.LogRecord) -> str:
    """The settled line as the ledger keeps it, with its traceback."""
    if isinstance(record.msg, dict):
        return with_traceback(line(record.msg), record.msg.get("exc_info"))
    return with_traceback(record.msg, failure(record.exc_info))


def with_traceback(text: str, error: BaseException | None) -> str:
    return f"{text}\n{failures.traceback_of(error)}" if error else text


def size(record: logging.LogRecord) -> int:
    """About how many bytes a settled record takes while it waits."""
    return OVERHEAD + _size(record.msg)


def _size(value: Any) -> int:
    if type(value) is str:
        return sys.getsizeof(value)
    if isinstance(value, dict):
        return sum([_size(item) for item in value.values() if type(item) in _SIZED])
    return sum(map(_size, value)) if isinstance(value, list) else ITEM
