"""Time zones by the names that IANA gives them, which mean the same on every machine."""

from __future__ import annotations

import re
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from service.errors import InvalidSchedule
from service.escaping import echoed

_NAME = re.compile(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*")

# What else lies in a machine's folder of zones: its own setting, a placeholder, and copies that may count leap seconds.
_NO_ZONES = re.compile(r"localtime|posixrules|Factory|(right|posix)/.*")


def zone_of(timezone: str) -> ZoneInfo:
    """Raises InvalidSchedule for what is no zone of IANA's, also where this machine has a file for it."""
    allowed = "IANA names such as 'Europe/Berlin' or 'UTC' are allowed"
    if _NO_ZONES.fullmatch(timezone):
        raise InvalidSchedule(f"the time zone {echoed(timezone)} means something else on each machine: {allowed}")
    try:
        if _NAME.fullmatch(timezone):
            return ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        pass
    raise InvalidSchedule(f"unknown time zone {echoed(timezone)}: {allowed}")
