"""How long a failure asks to be left alone: a raised RetryAfter, or the Retry-After of an httpx response."""

from __future__ import annotations

import sys
from datetime import UTC
from email.utils import parsedate_to_datetime

from service import clock
from service.errors import RetryAfter

FAR = 10**12
"""Seconds; `max_wait` is shorter in any case."""


def seconds_asked(error: BaseException) -> float | None:
    """The seconds that `error` asks for, not below 0; None where it says nothing that can be read."""
    if isinstance(error, RetryAfter):
        return max(0.0, error.seconds)
    httpx = sys.modules.get("httpx")  # an error of its own can't be here before it is imported, which takes long
    if httpx is None or not isinstance(error, httpx.HTTPStatusError):
        return None
    headers = getattr(error.response, "headers", {})  # a test may leave out the response
    return _seconds(headers.get("Retry-After", "").strip())


def _seconds(header: str) -> float | None:
    """A header's value: whole seconds, or an HTTP date."""
    if header.isdecimal() and header.isascii():
        return float(min(FAR, int(header[:20])))
    try:
        at = parsedate_to_datetime(header)
    except ValueError:
        return None
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return max(0.0, (at - clock.now()).total_seconds())
