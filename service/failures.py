"""An exception as text, whatever it is: an author's may be endless, and its `__str__` may raise anything."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Iterator

LONGEST = 20_000
"""Characters of a message, which are its first ones; and of a traceback, which are its last ones."""

LONGEST_LINE = 500

LONGEST_PART = 10_000
"""Characters of a frame, or of the message, in a traceback: so the last frames are there too."""


def readable(error: BaseException) -> BaseException:
    """The same, or where it can't be shown one that can, so that whoever logs it is safe."""
    try:
        str(error), deque(_parts(error), maxlen=0)
    except Exception:  # noqa: BLE001 - it may raise anything
        return RuntimeError(f"{type(error).__name__}, whose text can't be read").with_traceback(error.__traceback__)
    return error


def line_of(error: BaseException) -> str:
    """Its class, and the first line of its message."""
    name, text = type(error).__name__, message_of(error).strip().split("\n")[0][:LONGEST_LINE]
    return f"{name}: {text}" if text else name


def message_of(error: BaseException) -> str:
    try:
        return str(error)[:LONGEST]
    except Exception:  # noqa: BLE001 - an author's __str__ may raise anything
        return "its text can't be read"


def traceback_of(error: BaseException) -> str:
    """As Python prints it, without the line feed at its end."""
    parts: deque[str] = deque()
    size = 0
    try:
        for part in _parts(error):
            parts.append(part if len(part) <= LONGEST_PART else f"{part[:LONGEST_PART]}… ({len(part):,} characters)\n")
            size += len(parts[-1])
            while size > LONGEST and len(parts) > 1:
                size -= len(parts.popleft())
    except Exception:  # noqa: BLE001 - an author's error may have anything where Python looks for its own
        parts.append(f"{type(error).__name__}: its traceback can't be read")
    return "".join(parts).rstrip()


def _parts(error: BaseException) -> Iterator[str]:
    return traceback.TracebackException.from_exception(error, compact=True).format()


def facts_of(error: BaseException) -> dict[str, str]:
    """As the ledger keeps it."""
    return {"type": type(error).__name__, "message": message_of(error), "traceback": traceback_of(error)}
