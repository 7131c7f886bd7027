"""Which backups go, and why each of the others stays. It decides only; by the times in the names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from service.backup.file.folder import taken_at

DAY = timedelta(days=1)
CLOCKS_DIFFER = timedelta(hours=1)
"""What is farther in the future was named by a clock that was wrong. It stays until its time has come, and that is all:
it is not the newest one, or nothing would ever be compared with today's."""
MOST_NAMED = 5


@dataclass(frozen=True)
class Kept:
    """A backup in a place, with what is known of it. `rows`: None where nobody has counted. `unread`: it could not be
    looked into, which says nothing against it."""

    name: str
    taken_at: datetime
    rows: int | None = None
    verified: bool = False
    failed: bool = False
    pinned: bool = False
    unread: bool = False


@dataclass(frozen=True)
class Rules:
    """`last`: so many of the newest stay. `days`: all younger ones stay. `weekly`, `monthly`: so many weeks and months
    whose newest stays. `least_share`: a newest one with fewer of the last one's rows lets nothing go."""

    days: int
    last: int = 1
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
    """`doubt`: why nothing goes this time; None where the newest backup can be relied on. `ahead`: names of a time to
    come."""

    verdicts: tuple[Verdict, ...]
    doubt: str | None
    ahead: tuple[str, ...] = ()

    @property
    def going(self) -> list[str]:
        """The oldest first."""
        return [verdict.name for verdict in reversed(self.verdicts) if not verdict.stays]

    @property
    def too_many(self) -> str | None:
        """Why a person has to say that they go: a setting that was mistaken would take most of them at once."""
        going, all_of_them = len(self.going), len(self.verdicts)
        return f"{going} of {all_of_them} would go at once" if going > all_of_them / 2 else None


def decide(backups: Iterable[Kept], rules: Rules, now: datetime) -> Decision:
    """A verdict on each backup, the newest first. The newest, and the last verified one, stay in any case."""
    ordered = sorted(backups, key=lambda one: (one.taken_at, one.name), reverse=True)
    made = [one for one in ordered if one.taken_at <= now + CLOCKS_DIFFER]
    reasons = _reasons(ordered, made, rules, now)
    doubt = _doubt(made, rules.least_share)
    old = f"older than {rules.days} day{'s' if rules.days > 1 else ''}"
    verdicts = []
    for one in ordered:
        found = reasons.get(one.name)
        kept = found or ("the newest one is in doubt" if doubt else None)
        verdicts.append(Verdict(one.name, kept is not None, kept or old))
    ahead = tuple(one.name for one in ordered[: len(ordered) - len(made)])
    return Decision(tuple(verdicts), doubt, ahead)


def _reasons(ordered: Sequence[Kept], made: Sequence[Kept], rules: Rules, now: datetime) -> dict[str, str]:
    """Why each of those stays that stay, whatever the newest one is like. The first reason counts."""
    reasons = {one.name: "pinned" for one in ordered if one.pinned}
    if made:
        reasons.setdefault(made[0].name, "the newest")
    if verified := next((one for one in made if one.verified), None):
        reasons.setdefault(verified.name, "the last verified one")
    for one in ordered:
        if one.unread:
            reasons.setdefault(one.name, "can't be read")
        elif one.taken_at > now + CLOCKS_DIFFER:
            reasons.setdefault(one.name, "of a time to come")
    for name in _first_of_each(made, lambda at: at, rules.last):
        reasons.setdefault(name, f"of the last {rules.last}")
    for name, age in _ages(made, now).items():
        if age <= timedelta(days=rules.days):
            reasons.setdefault(name, "daily")
    for name in _first_of_each(made, lambda at: at.isocalendar()[:2], rules.weekly):
        reasons.setdefault(name, "weekly")
    for name in _first_of_each(made, lambda at: (at.year, at.month), rules.monthly):
        reasons.setdefault(name, "monthly")
    return reasons


def _ages(ordered: Sequence[Kept], now: datetime) -> dict[str, timedelta]:
    """How old each is, where more than a day without a backup counts as one day: neither a silence nor a clock that
    jumps makes all of them old at once."""
    ages: dict[str, timedelta] = {}
    age, later = timedelta(), now
    for one in ordered:
        age += min(max(later - one.taken_at, timedelta()), DAY)
        ages[one.name], later = age, one.taken_at
    return ages


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
    if newest.unread:
        return f"{newest.name} can't be read"
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


def latest_of(names: Collection[str], now: datetime) -> str | None:
    return max((name for name in names if not is_ahead(name, now)), default=None)


def is_ahead(name: str, now: datetime) -> bool:
    """Whether its name is of a time to come, by more than clocks differ: the clock that gave it was wrong."""
    at = taken_at(Path(name))
    return at is not None and at > now + CLOCKS_DIFFER


def ahead_named(names: Collection[str]) -> str:
    """For a warning."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    are = "is" if len(names) == 1 else "are"
    return f"{', '.join(sorted(names)[:MOST_NAMED])}{more} {are} of a time to come, by this machine's clock"
