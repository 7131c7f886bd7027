"""Log lines as text: logged values are copied at once, and cut to a limited size, before they are
rendered.

A thread renders a line later, while the code that logged it may change its objects. Many thousands
of lines may wait for a slow stderr, or for a ledger that can't be reached.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from batch_system import failures

LONGEST = 64_000
"""The longest message or value, in bytes of UTF-8. A longer one is cut, and ends with the number of
characters cut.
"""

LONGEST_LINE = 100_000
"""The longest line, in bytes, with its values and its traceback."""

MOST_DIGITS = 4_000
"""The longest number, in digits. Python refuses to convert a much longer one to text."""

ITEM = 16
"""Each item of a list counts as at least this many characters."""

OVERHEAD = 1_000
"""The estimated size of a record without its texts, in bytes."""

_MORE = "…"

_SIZED = {str, list, dict}

_RECORD_KEYS = vars(logging.makeLogRecord({})).keys() | {
    "message",
    "asctime",
    "taskName",
    "batch_stamp",
}

FIELDS = "batch_fields"
"""The key of a dict of values that only JSON lines show, each as a field. The text of the message
already contains them.
"""

_OWN_KEYS = {"event", "level", "logger", "exc_info", "stack", FIELDS}


def line(settled: Mapping[str, Any]) -> str:
    """The message and its key=value pairs, without the traceback."""
    pairs = (f"{key}={value!r}" for key, value in settled.items() if key not in _OWN_KEYS)
    stack = f"\n{settled['stack']}" if "stack" in settled else ""
    return " ".join([str(settled.get("event", "")), *pairs]) + stack


def failure(exc_info: Any) -> BaseException | None:
    """The exception that `exc_info=` stands for: itself, that of stdlib's tuple, or for True the
    one being handled.
    """
    if exc_info and not isinstance(exc_info, BaseException | tuple):
        exc_info = sys.exc_info()
    if isinstance(exc_info, tuple):
        exc_info = exc_info[1]
    return exc_info if isinstance(exc_info, BaseException) else None


def bounded(text: str, longest: int = LONGEST) -> str:
    """The text cut to `longest` bytes of UTF-8, with the number of characters cut. A long text is
    not copied as a whole.
    """
    if len(text) <= longest // 4 or (text.isascii() and len(text) <= longest):
        return text
    kept = text[:longest].encode("utf-8", "replace")[:longest].decode("utf-8", "ignore")
    return (
        kept
        if len(kept) == len(text)
        else f"{kept}... (cut: {len(text) - len(kept):,} more characters)"
    )


def plain(value: Any) -> Any:
    """A bounded copy of a value, of types that JSON has. The author's code may change the value
    afterwards.
    """
    kind = type(value)
    if value is None or kind is bool or (kind is float and math.isfinite(value)):
        return value
    if kind is str:
        return bounded(value)
    if kind is int:
        return (
            value
            if value.bit_length() < 3 * MOST_DIGITS
            else f"<a number of {value.bit_length():,} bits>"
        )
    return _Copy().of(value)


class _Copy:
    """Copies one value up to LONGEST characters in all. A `…` stands for the rest."""

    def __init__(self) -> None:
        self._left = LONGEST

    def of(self, value: Any, depth: int = 5) -> Any:
        """The copy. Containers nested deeper than `depth` are copied as text."""
        try:
            if depth and isinstance(value, dict):
                pairs = self._first(value.items(), (_MORE, _MORE))
                return {self._text(key): self.of(item, depth - 1) for key, item in pairs}
            if depth and isinstance(value, list | tuple | set | frozenset):
                return [self.of(item, depth - 1) for item in self._first(value, _MORE)]
            # Such as an IntEnum.
            if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
                return plain(
                    int.__int__(value) if isinstance(value, int) else float.__float__(value)
                )
            return None if value is None else self._text(value)
        except Exception:  # noqa: BLE001 - an author's __str__ may raise anything
            return f"<{type(value).__name__} without a text>"

    def _first(self, items: Iterable[Any], ellipsis: Any) -> Iterator[Any]:
        for item in items:
            if self._left <= 0:
                yield ellipsis
                return
            self._left -= ITEM
            yield item

    def _text(self, value: Any) -> str:
        text = str.__str__(value) if isinstance(value, str) else str(value)
        left = max(0, self._left)
        self._left = self._left - len(text)
        return bounded(text if len(text) <= left else f"{text[:left]}{_MORE}")


def values_of(event: Mapping[str, Any]) -> dict[str, Any]:
    """Bounded copies of all values of a structlog event."""
    return {key: plain(value) for key, value in event.items()}


class Settled(dict[str, Any]):
    """A structlog event that other libraries' handlers show as its line."""

    def __str__(self) -> str:
        return line(self)


def settle(record: logging.LogRecord) -> None:
    """Replace everything in the record that may change before it is rendered by bounded copies."""
    if hasattr(record, "_logger"):  # a record of structlog
        event: dict[str, Any] = dict(record.msg)  # type: ignore[arg-type]
        error = failure(event.pop("exc_info", None))
        settled = values_of(event)
        record.msg = Settled(settled, exc_info=error) if error else Settled(settled)
        record.exc_info = (type(error), error, error.__traceback__) if error else None
        return
    try:
        record.msg = bounded(record.getMessage())
    except Exception as error:  # noqa: BLE001 - stdlib does not raise it either
        record.msg = (
            f"{plain(record.msg)} {plain(record.args)} ({type(error).__name__}: the arguments "
            "don't fit the text)"
        )
    if record.stack_info:
        record.msg, record.stack_info = f"{record.msg}\n{record.stack_info}", None
    record.args = None
    for rendered in ("message", "asctime"):  # set by another handler's formatter
        vars(record).pop(rendered, None)
    for name in vars(record).keys() - _RECORD_KEYS:  # set by `extra=`
        setattr(record, name, plain(getattr(record, name)))


def text(record: logging.LogRecord) -> str:
    """The line of a settled record as the ledger keeps it, with its traceback."""
    if isinstance(record.msg, dict):
        return with_traceback(line(record.msg), record.msg.get("exc_info"))
    return with_traceback(record.msg, failure(record.exc_info))


def with_traceback(text: str, error: BaseException | None) -> str:
    """The text, followed by the traceback of an error on lines of its own."""
    return f"{text}\n{failures.traceback_of(error)}" if error else text


def size(record: logging.LogRecord) -> int:
    """The estimated size of a settled record in memory, in bytes."""
    return OVERHEAD + _size(record.msg)


def _size(value: Any) -> int:
    if type(value) is str:
        return sys.getsizeof(value)
    if isinstance(value, dict):
        return sum([_size(item) for item in value.values() if type(item) in _SIZED])
    return sum(map(_size, value)) if isinstance(value, list) else ITEM
