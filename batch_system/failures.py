"""Exceptions as text of limited length. The text of an author's exception may be very long, and its
`__str__` may raise.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Iterator, Mapping

LONGEST = 20_000
"""Longest text in characters: the beginning of a message, or the end of a traceback."""

LONGEST_LINE = 500

LONGEST_PART = 10_000
"""Longest frame or message within a traceback, in characters, so that the last frames fit too."""


def readable(error: BaseException) -> BaseException:
    """The error itself, or, if it can't be converted to text, a RuntimeError that names its
    class.
    """
    try:
        str(error), deque(_parts(error), maxlen=0)
    except Exception:  # noqa: BLE001 - an author's __str__ may raise anything
        return RuntimeError(f"{type(error).__name__}, whose text can't be read").with_traceback(
            error.__traceback__
        )
    return error


def line_of(error: BaseException) -> str:
    """The error's class and the first line of its message."""
    name, text = type(error).__name__, message_of(error).strip().split("\n")[0][:LONGEST_LINE]
    return f"{name}: {text}" if text else name


def message_of(error: BaseException) -> str:
    """The error's message, cut to LONGEST characters. Never raises."""
    try:
        return str(error)[:LONGEST]
    except Exception:  # noqa: BLE001 - an author's __str__ may raise anything
        return "its text can't be read"


def traceback_of(error: BaseException) -> str:
    """The traceback as Python prints it, without the final line feed. Never raises."""
    if isinstance(error, ReportedError):
        return error.traceback
    parts: deque[str] = deque()
    size = 0
    try:
        for part in _parts(error):
            parts.append(
                part
                if len(part) <= LONGEST_PART
                else f"{part[:LONGEST_PART]}… ({len(part):,} characters)\n"
            )
            size += len(parts[-1])
            while size > LONGEST and len(parts) > 1:
                size -= len(parts.popleft())
    except Exception:  # noqa: BLE001
        # An author's error may have attributes that Python can't print.
        parts.append(f"{type(error).__name__}: its traceback can't be read")
    return "".join(parts).rstrip()


def _parts(error: BaseException) -> Iterator[str]:
    return traceback.TracebackException.from_exception(error, compact=True).format()


def facts_of(error: BaseException) -> dict[str, str]:
    """The error as the ledger stores it: `type`, `message` and `traceback`."""
    return {
        "type": type(error).__name__,
        "message": message_of(error),
        "traceback": traceback_of(error),
    }


class ReportedError(Exception):
    """An error that another process has reported. `traceback`: as that process has printed it."""

    def __init__(self, message: str, traceback: str) -> None:
        super().__init__(message)
        self.traceback = traceback
        # This shows the traceback in handlers of other libraries.
        self.add_note(f"as another process has reported it:\n{traceback}")


def reported(facts: Mapping[str, str]) -> ReportedError:
    """An error made from what `facts_of` has returned. The name of its class is the `type`."""
    kind: type[ReportedError] = type(
        facts["type"][:LONGEST_LINE], (ReportedError,), {"__module__": "builtins"}
    )
    return kind(facts["message"][:LONGEST], facts["traceback"][: 2 * LONGEST])
