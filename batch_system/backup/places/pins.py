"""Pins: small files NAME.pin beside a backup in each place, with who pinned it and when, as JSON.

A backup is pinned if the file exists, whatever it holds. Its content is only displayed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from batch_system.backup.file.folder import ABANDONED_AFTER, PIN, taken_at
from batch_system.backup.places.place import Storage, backups
from batch_system.errors import BackupError

MOST_BYTES = 4096
MOST_CHARACTERS = 100


@dataclass(frozen=True)
class Pin:
    """Who pinned a backup, and when (UTC); None if the file does not say."""

    by: str | None = None
    at: datetime | None = None


@dataclass(frozen=True)
class Listing:
    """The backups of a place with their sizes in bytes, and the pinned names, including those
    without a backup.
    """

    place: str
    sizes: dict[str, int]
    pinned: frozenset[str]

    @property
    def orphans(self) -> frozenset[str]:
        """The pinned names of which the place has no backup."""
        return self.pinned - self.sizes.keys()


def look(storage: Storage) -> Listing:
    """List the backups and pins of a place. Raises BackupError."""
    listed = storage.listed()
    names = (name.removesuffix(PIN) for name in listed if name.endswith(PIN))
    return Listing(
        storage.place, backups(listed), frozenset(name for name in names if taken_at(Path(name)))
    )


def is_pinned(storage: Storage, name: str) -> bool:
    return storage.has(name + PIN)


def put(storage: Storage, name: str, pin: Pin) -> bool:
    """Pin a backup. Returns False if it is already pinned; its pin is then left as it is. Raises
    BackupError.
    """
    at = pin.at.isoformat(timespec="seconds") if pin.at else None
    return storage.write(name + PIN, json.dumps({"by": pin.by, "at": at}).encode() + b"\n")


def remove(storage: Storage, name: str) -> bool:
    """Unpin a backup. Returns False if it was not pinned. Raises BackupError."""
    if not is_pinned(storage, name):
        return False
    storage.delete(name + PIN)
    return True


def read(storage: Storage, name: str) -> Pin:
    """The content of a backup's pin. Raises BackupError if the place can't be read."""
    return _parsed(storage.read(name + PIN, MOST_BYTES + 1))


def _parsed(data: bytes) -> Pin:
    try:
        facts = json.loads(data) if len(data) <= MOST_BYTES else None
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        return Pin()
    return Pin(_printable(facts.get("by")), _instant(facts.get("at")))


def _printable(by: object) -> str | None:
    if not isinstance(by, str):
        return None
    return "".join(
        character if character.isprintable() else "?" for character in by[:MOST_CHARACTERS]
    )


def _instant(at: object) -> datetime | None:
    try:
        instant = datetime.fromisoformat(at) if isinstance(at, str) else None
        return instant.astimezone(UTC) if instant and instant.tzinfo else None
    except (ValueError, OverflowError):
        return None


def remove_orphans(storage: Storage, names: Iterable[str], now: datetime) -> None:
    """Remove the pins of these backups, which no longer exist.

    A pin younger than a day is kept: a copy of the backup may be on its way, and the pin is copied
    first.
    """
    for name in names:
        with suppress(BackupError):  # a leftover pin does no harm
            changed = storage.changed_at(name + PIN)
            if changed and now - changed > ABANDONED_AFTER and not storage.has(name):
                storage.delete(name + PIN)
