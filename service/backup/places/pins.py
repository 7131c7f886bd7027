"""A pinned backup has a small file beside it, in each place: NAME.pin, with who pinned it and when as JSON.

That it is there is all that counts, whatever it holds: what is in it is only ever shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from service.backup.file.folder import ABANDONED_AFTER, PIN, taken_at
from service.backup.places.place import Storage, backups
from service.errors import BackupError

MOST_BYTES = 4096
MOST_LETTERS = 100


@dataclass(frozen=True)
class Pin:
    """None where the file does not say it."""

    by: str | None = None
    at: datetime | None = None


@dataclass(frozen=True)
class Seen:
    """What is in a place: its backups with their sizes, and the names to which there is a pin, with a backup or not."""

    place: str
    sizes: dict[str, int]
    pinned: frozenset[str]

    @property
    def orphans(self) -> frozenset[str]:
        return self.pinned - self.sizes.keys()


def look(storage: Storage) -> Seen:
    """Raises BackupError."""
    listed = storage.listed()
    names = (name.removesuffix(PIN) for name in listed if name.endswith(PIN))
    return Seen(storage.place, backups(listed), frozenset(name for name in names if taken_at(Path(name))))


def is_pinned(storage: Storage, name: str) -> bool:
    return storage.has(name + PIN)


def put(storage: Storage, name: str, pin: Pin) -> bool:
    """False: it was pinned already, and by whom stays. Raises BackupError."""
    at = pin.at.isoformat(timespec="seconds") if pin.at else None
    return storage.write(name + PIN, json.dumps({"by": pin.by, "at": at}).encode() + b"\n")


def remove(storage: Storage, name: str) -> bool:
    """False: it was not pinned. Raises BackupError."""
    if not is_pinned(storage, name):
        return False
    storage.delete(name + PIN)
    return True


def read(storage: Storage, name: str) -> Pin:
    """Raises BackupError where the place can't be read."""
    return _parsed(storage.read(name + PIN, MOST_BYTES + 1))


def _parsed(data: bytes) -> Pin:
    try:
        facts = json.loads(data) if len(data) <= MOST_BYTES else None
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        return Pin()
    return Pin(_shown(facts.get("by")), _instant(facts.get("at")))


def _shown(by: object) -> str | None:
    if not isinstance(by, str):
        return None
    return "".join(letter if letter.isprintable() else "?" for letter in by[:MOST_LETTERS])


def _instant(at: object) -> datetime | None:
    try:
        instant = datetime.fromisoformat(at) if isinstance(at, str) else None
        return instant.astimezone(UTC) if instant and instant.tzinfo else None
    except (ValueError, OverflowError):
        return None


def remove_orphans(storage: Storage, names: Iterable[str], now: datetime) -> None:
    """Remove the pins of these backups, which are gone. A young one may be of a copy on its way: the pin goes first."""
    for name in names:
        with suppress(BackupError):  # it does no harm where it is
            changed = storage.changed_at(name + PIN)
            if changed and now - changed > ABANDONED_AFTER and not storage.has(name):
                storage.delete(name + PIN)
