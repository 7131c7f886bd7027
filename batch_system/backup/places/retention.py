"""Decides from the times in their names which backups should be deleted, and why each of the others
is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from batch_system.backup.file.folder import taken_at

DAY = timedelta(days=1)
CLOCKS_DIFFER = timedelta(hours=1)
"""A backup with a name farther in the future was named by a wrong clock. It is kept until that time
has come. It does not count as the newest, because today's backups would then never be compared with
each other.
"""
MOST_NAMED = 5


@dataclass(frozen=True)
class Candidate:
    """A backup in a place, about which is decided.

    `taken_at`: the time in its name (UTC). `rows`: None if unknown. `failed`: its last check
    failed. `unread`: its content could not be read, for example because the place did not answer;
    that does not mean that it is damaged.
    """

    name: str
    taken_at: datetime
    rows: int | None = None
    verified: bool = False
    failed: bool = False
    pinned: bool = False
    unread: bool = False


@dataclass(frozen=True)
class Rules:
    """Which backups are kept.

    `last`: how many of the newest. `days`: all that are younger. `weekly`, `monthly`: for how many
    weeks and months the newest one is kept. `least_share`: nothing is deleted if the newest has a
    smaller share of the previous one's rows.
    """

    days: int
    last: int = 1
    weekly: int = 0
    monthly: int = 0
    least_share: float = 0.5


@dataclass(frozen=True)
class Verdict:
    """The decision on one backup. `why`: the reason, in a few words."""

    name: str
    stays: bool
    why: str


@dataclass(frozen=True)
class Decision:
    """The verdicts, the newest backup first.

    `doubt`: why the newest backup can't be relied on, so nothing is deleted; else None.
    `in_future`: names in the future.
    """

    verdicts: tuple[Verdict, ...]
    doubt: str | None
    in_future: tuple[str, ...] = ()

    @property
    def going(self) -> list[str]:
        """The names of the backups to delete, the oldest first."""
        return [verdict.name for verdict in reversed(self.verdicts) if not verdict.stays]

    @property
    def too_many(self) -> str | None:
        """Why a person has to confirm the deletion: a wrong setting could delete more than half at
        once. None if not.
        """
        going, total = len(self.going), len(self.verdicts)
        return f"{going} of {total} would go at once" if going > total / 2 else None


def decide(backups: Iterable[Candidate], rules: Rules, now: datetime) -> Decision:
    """A verdict on each backup, the newest first. The newest and the last verified one are always
    kept.
    """
    ordered = sorted(backups, key=lambda backup: (backup.taken_at, backup.name), reverse=True)
    past = [backup for backup in ordered if backup.taken_at <= now + CLOCKS_DIFFER]
    reasons = _reasons(ordered, past, rules, now)
    doubt = _doubt(past, rules.least_share)
    old = f"older than {rules.days} day{'s' if rules.days > 1 else ''}"
    verdicts = []
    for backup in ordered:
        reason = reasons.get(backup.name) or ("the newest one is in doubt" if doubt else None)
        verdicts.append(Verdict(backup.name, reason is not None, reason or old))
    in_future = tuple(backup.name for backup in ordered[: len(ordered) - len(past)])
    return Decision(tuple(verdicts), doubt, in_future)


def _reasons(
    ordered: Sequence[Candidate], past: Sequence[Candidate], rules: Rules, now: datetime
) -> dict[str, str]:
    """The first reason to keep each backup that is kept even if the newest one can be relied on, by
    its name.

    `ordered`: all backups, the newest first; `past`: those of them without names in the future.
    """
    reasons = {backup.name: "pinned" for backup in ordered if backup.pinned}
    if past:
        reasons.setdefault(past[0].name, "the newest")
    if verified := next((backup for backup in past if backup.verified), None):
        reasons.setdefault(verified.name, "the last verified one")
    for backup in ordered:
        if backup.unread:
            reasons.setdefault(backup.name, "can't be read")
        elif backup.taken_at > now + CLOCKS_DIFFER:
            reasons.setdefault(backup.name, "in the future")
    for name in _first_of_each(past, lambda at: at, rules.last):
        reasons.setdefault(name, f"of the last {rules.last}")
    for name, age in _ages(past, now).items():
        if age <= timedelta(days=rules.days):
            reasons.setdefault(name, "daily")
    for name in _first_of_each(past, lambda at: at.isocalendar()[:2], rules.weekly):
        reasons.setdefault(name, "weekly")
    for name in _first_of_each(past, lambda at: (at.year, at.month), rules.monthly):
        reasons.setdefault(name, "monthly")
    return reasons


def _ages(ordered: Sequence[Candidate], now: datetime) -> dict[str, timedelta]:
    """The age of each backup, where a gap of more than a day between two backups counts as one day.

    So all backups do not become old at once after a time without backups, or when the clock jumps.
    """
    ages: dict[str, timedelta] = {}
    age, later = timedelta(), now
    for backup in ordered:
        age += min(max(later - backup.taken_at, timedelta()), DAY)
        ages[backup.name], later = age, backup.taken_at
    return ages


def _first_of_each(
    ordered: Sequence[Candidate], period: Callable[[datetime], object], count: int
) -> list[str]:
    """The newest backup of each of the last `count` periods that have a backup without a failed
    check.

    In a period between them whose backups have all failed, the newest is kept too, because its copy
    in the other place may be sound. Such a period does not count.
    """
    newest: dict[object, Candidate] = {}
    for backup in sorted(ordered, key=lambda backup: backup.failed):
        newest.setdefault(period(backup.taken_at), backup)
    names: list[str] = []
    for backup in sorted(newest.values(), key=lambda backup: backup.taken_at, reverse=True):
        if count == 0:
            break
        names.append(backup.name)
        count -= not backup.failed
    return names


def _doubt(ordered: Sequence[Candidate], least_share: float) -> str | None:
    """Why the newest backup can't be relied on; None if it can."""
    if not ordered:
        return None
    newest, *others = ordered
    if newest.failed:
        return f"{newest.name} has failed its check"
    if newest.unread:
        return f"{newest.name} can't be read"
    sound = [
        (backup.name, backup.rows)
        for backup in others
        if backup.rows is not None and not backup.failed
    ]
    if newest.rows == 0:  # the backups of the last days may be empty too
        sound = [(name, rows) for name, rows in sound if rows]
    if newest.rows is None or not sound:
        return None
    name, rows = sound[0]
    if newest.rows == 0:
        return f"{newest.name} has no rows, and {name} had {rows:,}"
    if newest.rows < least_share * rows:
        return (
            f"{newest.name} has {newest.rows:,} rows, and {name} had {rows:,}: less than "
            f"{least_share:.0%} of them (BACKUP_LEAST_SHARE)"
        )
    return None


def latest_of(names: Collection[str], now: datetime) -> str | None:
    """The newest of these names of backups that is not in the future; None if there is none."""
    return max((name for name in names if not is_in_future(name, now)), default=None)


def is_in_future(name: str, now: datetime) -> bool:
    """Whether the time in a backup's name is in the future by more than clocks differ, so the clock
    was wrong.
    """
    at = taken_at(Path(name))
    return at is not None and at > now + CLOCKS_DIFFER


def describe_future(names: Collection[str]) -> str:
    """The beginning of a warning about backups with these names, which are in the future."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    are = "is" if len(names) == 1 else "are"
    return (
        f"{', '.join(sorted(names)[:MOST_NAMED])}{more} {are} in the future, by this machine's "
        "clock"
    )
