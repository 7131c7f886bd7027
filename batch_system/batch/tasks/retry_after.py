"""The wait that an error asks for: that of a RetryAfter, or the Retry-After header of an httpx
response.
"""

from __future__ import annotations

import sys
from datetime import UTC
from email.utils import parsedate_to_datetime

from batch_system import clock
from batch_system.errors import RetryAfter

MOST_SECONDS = 10**12
"""The most seconds that are read. The policy's `max_wait` is always shorter."""


def seconds_asked(error: BaseException) -> float | None:
    """The seconds that `error` asks for, at least 0; None if it asks for none, or its header can't
    be read.
    """
    if isinstance(error, RetryAfter):
        return max(0.0, error.seconds)
    # An error of httpx can't exist before httpx is imported, and importing it takes long.
    httpx = sys.modules.get("httpx")
    if httpx is None or not isinstance(error, httpx.HTTPStatusError):
        return None
    headers = getattr(error.response, "headers", {})  # a test may leave out the response
    return _seconds(headers.get("Retry-After", "").strip())


def _seconds(header: str) -> float | None:
    """The seconds that the value of a header means: a whole number of seconds, or an HTTP date.
    None for others.
    """
    if header.isdecimal() and header.isascii():
        return float(min(MOST_SECONDS, int(header[:20])))
    try:
        at = parsedate_to_datetime(header)
    except ValueError:
        return None
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return max(0.0, (at - clock.now()).total_seconds())
