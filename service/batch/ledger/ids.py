"""The ids of rows: UUIDs that sort by the time of their making."""

from __future__ import annotations

import secrets

from service import clock


def new_id() -> str:
    """A new UUIDv7: ids sort by the time of their making (RFC 9562, method 3: 12 bits below the
    millisecond).
    """
    milliseconds, nanoseconds = divmod(clock.unix_ns(), 1_000_000)
    high = milliseconds << 16 | 0x7000 | nanoseconds * 4096 // 1_000_000
    digits = f"{high:016x}{0x8000000000000000 | secrets.randbits(62):016x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
