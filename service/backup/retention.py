"""Which backups go, and why each of the others stays. It decides only; by the times in the names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

CLOCKS_DIFFER = timedelta(hours=1)
"""What is farther in the future was named by a clock that was wrong. It stays until its time has come, and that is all:
it is not the newest one, or nothing would ever be compared with today's."""


@dataclass(frozen=True)
class Kept:
    """A backup in a place, with what is known of it. `rows`: None where nobody has counted."""

    name: str
    taken_at: datetime
    rows: int | None = None
    verified: bool = False
    failed: bool = False
    pinned: bool = False


@dataclass(frozen=True)
class Rules:
    """`days`: all younger ones stay. `weekly`, `monthly`: so many weeks and months whose newest stays. `least_share`:
    a newest one with fewer of the last one's rows lets nothing go."""

    days: int
    weekly: int = 0
    monthly: int = 0
    least_share: float = 0.5


@dataclass(frozen=True)
class Verdict:
    name: str
    stays: bool
    why: str


@dataclass(frozen=True)
class Decision:
    """`doubt`: why nothing goes this time; None where the newest backup can be relied on."""

    verdicts: tuple[Verdict, ...]
    doubt: str | None

    @property
    def going(self) -> list[str]:
        """The oldest first."""
        return [verdict.name for verdict in reversed(self.verdicts) if not verdict.stays]


def decide(backups: Iterable[Kept], rules: Rules, now: datetime) -> Decision:
    """A verdict on each backup, the newest first. The newest, and the last verified one, stay in any case."""
    ordered = sorted(backups, key=lambda one: (one.taken_at, one.name), reverse=True)
    made = [one for one in ordered if one.taken_at <= now + CLOCKS_DIFFER]
    reasons = _reasons(ordered, made, rules, now)
    doubt = _doubt(made, rules.least_share)
    verdicts = []
    for one in ordered:
        found = reasons.get(one.name)
        kept = found or ("the newest one is in doubt" if doubt else None)
        verdicts.append(Verdict(one.name, kept is not None, kept or f"older than {rules.days} days"))
    return Decision(tuple(verdicts), doubt)


def _reasons(ordered: Sequence[Kept], made: Sequence[Kept], rules: Rules, now: datetime) -> dict[str, str]:
    """Why each of those stays that stay, whatever the newest one is like. The first reason counts."""
    reasons = {one.name: "pinned" for one in ordered if one.pinned}
    if made:
        reasons.setdefault(made[0].name, "the newest")
    if verified := next((one for one in made if one.verified), None):
        reasons.setdefault(verified.name, "the last verified one")
    for one in ordered:
        if one.taken_at >= now - timedelta(days=rules.days):
            reasons.setdefault(one.name, "daily")
    for name in _first_of_each(made, lambda at: at.isocalendar()[:2], rules.weekly):
        reasons.setdefault(name, "weekly")
    for name in _first_of_each(made, lambda at: (at.year, at.month), rules.monthly):
        reasons.setdefault(name, "monthly")
    return reasons


def _first_of_each(ordered: Sequence[Kept], period: Callable[[datetime], object], count: int) -> list[str]:
    """The newest sound backup of each of the last `count` periods that have one.

    Of a period in between that has none the newest, for it may be sound in the other place. It doesn't count.
    """
    newest: dict[object, Kept] = {}
    for one in sorted(ordered, key=lambda one: one.failed):
        newest.setdefault(period(one.taken_at), one)
    found: list[str] = []
    for one in sorted(newest.values(), key=lambda one: one.taken_at, reverse=True):
        if count == 0:
            break
        found.append(one.name)
        count -= not one.failed
    return found


def _doubt(ordered: Sequence[Kept], least_share: float) -> str | None:
    """What is wrong with the newest one."""
    if not ordered:
        return None
    newest, *others = ordered
    if newest.failed:
        return f"{newest.name} has failed its check"
    counted = [(one.name, one.rows) for one in others if one.rows is not None and not one.failed]
    if newest.rows == 0:  # so may those of the last days be
        counted = [(name, rows) for name, rows in counted if rows]
    if newest.rows is None or not counted:
        return None
    name, rows = counted[0]
    if newest.rows == 0:
        return f"{newest.name} has no rows, and {name} had {rows:,}"
    if newest.rows < least_share * rows:
        return (
            f"{newest.name} has {newest.rows:,} rows, and {name} had {rows:,}: less than "
            f"{least_share:.0%} of them (BACKUP_LEAST_SHARE)"
        )
    return None
