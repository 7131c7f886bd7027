"""Limits of requests: how many one token may make in a second, and how often an address may guess a
token.
"""

from __future__ import annotations

from collections import OrderedDict

from batch_system import clock
from batch_system.web.problems import Refused

FAILURE_SECONDS = 60.0
LOOKS = 10
"""How many unknown secrets from a guessing address are looked up in a second."""
MOST_COUNTED = 10_000
"""How many tokens or addresses are counted at most; the one that was counted first is forgotten
first.
"""


class Limits:
    """Counts in this process. `requests`: how many one token may make in a second. `failures`: how
    many one address may have in a minute.
    """

    def __init__(self, requests: int, failures: int) -> None:
        self._requests = _Windows(1.0, requests)
        self._failures = _Windows(FAILURE_SECONDS, failures)
        self._looks = _Windows(1.0, LOOKS)

    def count(self, key: str) -> None:
        """Count a request of this token or person. Raises Refused, 429, if there are too many."""
        wait = self._requests.add(key)
        if wait is not None:
            raise Refused(429, "too many requests in a second with this token", _after(wait))

    def count_failure(self, address: str | None) -> None:
        """Count a token or link from this address that was not valid."""
        self._failures.add(address or "")

    def count_look(self, address: str | None) -> None:
        """Count a look-up of a secret from this address. Raises Refused, 429, if the address
        guesses fast.
        """
        wait = self._failures.full(address or "")
        if wait is not None and self._looks.add(address or "") is not None:
            raise Refused(429, "too many tokens that are not valid", _after(wait))

    def refuse_guesser(self, address: str | None) -> None:
        """Raises Refused, 429, if too many tokens from this address were not valid."""
        wait = self._failures.full(address or "")
        if wait is not None:
            raise Refused(429, "too many tokens that are not valid", _after(wait))


def _after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, round(seconds)))}


class _Windows:
    """For each key, how often something happened since its window began. A window ends after
    `seconds`.
    """

    def __init__(self, seconds: float, most: int) -> None:
        self._seconds = seconds
        self._most = most
        self._windows: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def add(self, key: str) -> float | None:
        """Count one more. If there are too many: the seconds until the window ends."""
        began, count = self._window(key)
        if count >= self._most:
            return began + self._seconds - clock.monotonic()
        self._windows[key] = began, count + 1
        if len(self._windows) > MOST_COUNTED:
            self._windows.popitem(last=False)
        return None

    def full(self, key: str) -> float | None:
        """The seconds until the window ends, if no more may be counted in it."""
        began, count = self._window(key)
        return began + self._seconds - clock.monotonic() if count >= self._most else None

    def _window(self, key: str) -> tuple[float, int]:
        now = clock.monotonic()
        began, count = self._windows.get(key, (now, 0))
        if now - began >= self._seconds:
            self._windows.pop(key, None)
            return now, 0
        return began, count
