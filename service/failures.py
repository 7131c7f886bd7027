"""An exception as text, whatever it is: an author's may be endless, and its `__str__` may raise anything."""

from __future__ import annotations

import traceback
from collections import deque

LONGEST = 20_000
"""Characters of a message, which are its first ones; and of a traceback, which are its last ones."""

LONGEST_PART = 10_000
"""Characters of a frame, or of the message, in a traceback: so the last frames are there too."""


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
        for part in traceback.TracebackException.from_exception(error, compact=True).format():
            parts.append(part if len(part) <= LONGEST_PART else f"{part[:LONGEST_PART]}… ({len(part):,} characters)\n")
            size += len(parts[-1])
            while size > LONGEST and len(parts) > 1:
                size -= len(parts.popleft())
    except Exception:  # noqa: BLE001 - an author's error may have anything where Python looks for its own
        parts.append(f"{type(error).__name__}: its traceback can't be read")
    return "".join(parts).rstrip()
