"""`H` in a cron expression: a value that a hash of the task chooses, so that many tasks don't fire
at the same instant. Pure.
"""

from __future__ import annotations

import hashlib
import re

from batch_system.errors import InvalidSchedule
from batch_system.escaping import echoed

_SIZES = {"second": 60, "minute": 60, "hour": 24}
_H = re.compile(r"H(?:\((\d{1,4})-(\d{1,4})\))?(?:/(\d{1,4}))?", re.IGNORECASE)
_BEGINS = re.compile(r"H(?![A-Z])", re.IGNORECASE)


def has_spread(cron: str) -> bool:
    """Whether the expression has an `H`."""
    return any(_BEGINS.match(part) for part in cron.split())


def spread(cron: str, task: str, salt: str = "", key: str = "") -> str:
    """The expression with a number, or a range with a step, for each `H`. Without an `H` it is
    returned as it is.

    The values depend on the name of the task, on `salt` (the setting BATCH_SPREAD), on the schedule
    key, and on the field. Raises InvalidSchedule.
    """
    parts = cron.split()
    if len(parts) not in (5, 6) or not has_spread(cron):
        return cron
    names = [*_SIZES][6 - len(parts) :]
    for place, part in enumerate(parts):
        if _BEGINS.match(part):
            name = names[place] if place < len(names) else None
            seed = "\0".join((salt, task, key, name or ""))
            parts[place] = _value(cron, name, part, seed)
    return " ".join(parts)


def _value(cron: str, field: str | None, part: str, seed: str) -> str:
    if field is None:
        raise InvalidSchedule(
            f"the cron expression {echoed(cron)} has {echoed(part)} in a field of days or months: "
            "H is allowed in the second, the minute and the hour"
        )
    size = _SIZES[field]
    found = _H.fullmatch(part)
    first, last, step = (
        (int(value) if value else None for value in found.groups())
        if found
        else (
            None,
            None,
            0,
        )
    )
    first, last = first or 0, size - 1 if last is None else last
    length = last - first + 1
    if not 0 <= first <= last < size or (step is not None and not 1 <= step <= length):
        raise InvalidSchedule(
            f"the cron expression {echoed(cron)} has a wrong {field} field {echoed(part)}: "
            f"allowed are H, H(0-{size // 2 - 1}) and H/{size // 4}, with values from 0 to "
            f"{size - 1}, and a step of at most the number of values"
        )
    digits = hashlib.sha256(seed.encode()).digest()[:8]
    start = first + int.from_bytes(digits) % (step or length)
    is_single = step is None or start + step > last
    return str(start) if is_single else f"{start}-{last}/{step}"
