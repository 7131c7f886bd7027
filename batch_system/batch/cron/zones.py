"""Time zones by their IANA names, which mean the same on every machine."""

from __future__ import annotations

import re
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from batch_system.errors import InvalidSchedule
from batch_system.escaping import echoed

_NAME = re.compile(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*")

# Other files in a machine's folder of zones: its own setting, a placeholder, and copies that may
# count leap seconds.
_NOT_IANA = re.compile(r"localtime|posixrules|Factory|(right|posix)/.*")


def zone_of(timezone: str) -> ZoneInfo:
    """The zone of an IANA name. Raises InvalidSchedule for any other name, even if this machine has
    a file for it.
    """
    allowed = "IANA names such as 'Europe/Berlin' or 'UTC' are allowed"
    if _NOT_IANA.fullmatch(timezone):
        raise InvalidSchedule(
            f"the time zone {echoed(timezone)} differs from machine to machine: {allowed}"
        )
    try:
        if _NAME.fullmatch(timezone):
            return ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        pass
    raise InvalidSchedule(f"unknown time zone {echoed(timezone)}: {allowed}")
