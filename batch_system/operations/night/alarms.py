"""The alarms of the night: the problems so serious that they come first."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from batch_system.batch.incidents.overdue import in_words
from batch_system.batch.ledger.states import IncidentKind
from batch_system.batch.night.tally import Window
from batch_system.concurrency.offload import offload
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.databases import Databases
from batch_system.operations.asking.results import Node
from batch_system.operations.night import sentence
from batch_system.operations.night.results import Need, NightBackup
from batch_system.operations.system.nodes import troubles_of

LEAST_FREE = 1_000_000
"""A disk with fewer free bytes is full: SQLite can't write there any more, or not for long."""
NAMES = {"ledger": "ledger", "application": "application's database"}
"""What people call the two databases, by part."""
_PARTS = {IncidentKind.CLOCK: "clock", IncidentKind.UNFIRED: "firing"}
"""The part of `/readyz` that says the same as an incident of the kind."""


async def of_nodes(context: Context, nodes: Sequence[Node], opened: Collection[str]) -> list[Need]:
    """Full disks, and what living nodes say is wrong with them, unless a full disk or an incident
    says the same. `opened`: the kinds of the open incidents.
    """
    disks = await offload(full_disks, context.databases)
    told = {*disks, *(part for kind, part in _PARTS.items() if kind in opened)}
    of_disks = [_alarm("disk", text) for text in disks.values()]
    return of_disks + [
        _alarm("readiness", text, subject=named) for named, text in troubles_of(nodes, told)
    ]


def of_slots(
    window: Window,
    living: list[Node],
    last_beat: datetime | None,
    backup: NightBackup,
    *,
    is_over: bool,
) -> list[Need]:
    """Alarms that no service runs, that slots are unaccounted for, and that the backup is old."""
    found = []
    number = window.counts["unaccounted"]
    if not living and not is_over:
        since = f" since {last_beat:%Y-%m-%d %H:%M} UTC" if last_beat is not None else ""
        wait = (
            f": {sentence.number(number, 'slot')} wait{'s' if number == 1 else ''}"
            if number
            else ""
        )
        found.append(_alarm("down", f"No service runs{since}{wait}"))
    if number:
        verb = "is" if number == 1 else "are"
        found.append(
            _alarm(
                "unaccounted", f"{sentence.number(number, 'slot')} {verb} unaccounted for", number
            )
        )
    if backup.age is not None and backup.age > backup.limit:
        age = in_words(timedelta(seconds=backup.age))
        found.append(
            _alarm(
                "backup",
                f"The newest verified backup is {age} old"
                if backup.name
                else "There is no verified backup",
            )
        )
    return found


def full_disks(databases: Databases) -> dict[str, str]:
    """What to say about full disks that hold SQLite files, by part. Nothing is known about the
    disks of PostgreSQL.
    """
    said = {}
    for part, folder in sqlite_folders(databases).items():
        with suppress(OSError):  # the file is not there: others say so
            if shutil.disk_usage(folder).free < LEAST_FREE:
                said[part] = f"The disk of the {NAMES[part]} is full: make room there"
    return said


def sqlite_folders(databases: Databases) -> dict[str, Path]:
    """The folders of the databases that are SQLite files, by part (a key of NAMES)."""
    both = {"ledger": databases.ledger, "application": databases.application}
    return {
        part: Path(database.url.database).resolve().parent
        for part, database in both.items()
        if database.kind == "sqlite" and database.url.database
    }


def _alarm(kind: str, error: str, number: int = 1, subject: str | None = None) -> Need:
    return Need(kind=kind, incident=None, task=None, subject=subject, open=number, error=error)
