"""The backups of the story: one each night, and some older ones."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

from batch_system import clock
from batch_system.backup.file.folder import PIN, STAMP
from batch_system.backup.places.place import FOLDER
from batch_system.batch.ledger import backups
from batch_system.batch.ledger.backups import CHECKSUMS, RESTORED, Facts
from batch_system.demo import files
from batch_system.demo.acts import nothing
from batch_system.demo.ordinary import Made
from batch_system.demo.times import at
from batch_system.demo.writing import Stage

LAST = at("10-25 02:00")
SIZE, ROWS, TABLES = 4_820_000_000, 61_325_194, 61
NIGHTS, SUNDAYS = 14, 8
PINNED, DAMAGED = at("09-30 02:00"), at("10-15 02:00")


def plan(stage: Stage, folder: Path) -> None:
    """Let a backup be made and checked each night. In the end there are those of the last nights
    and some Sundays.
    """
    made = {(made.run["task"], made.run["slot"]): made for made in stage.made}
    kept = {LAST - timedelta(days=number) for number in range(NIGHTS)} | {PINNED}
    kept |= {LAST - timedelta(weeks=number) for number in range(SUNDAYS)}
    for taken in sorted(slot for task, slot in made if task == "backup"):
        facts = _facts(taken, made["backup", taken])
        stage.add(made["backup", taken].ended, partial(_record, stage, facts), looks=False)
        drill = made["restore_drill", taken + timedelta(hours=2)]
        drill.run["result"] = {"backup": facts.name, "tables": facts.tables, "rows": facts.rows}
        stage.add(drill.ended, partial(_verify, stage, facts.name, RESTORED), looks=False)
        if taken in kept:
            files.write_backup(folder, facts.name, facts.size or 0)
        else:
            stage.add(
                taken + timedelta(days=NIGHTS, minutes=7),
                partial(_remove, stage, facts.name),
                looks=False,
            )
    stage.add(DAMAGED + timedelta(hours=31, minutes=20), partial(_fail, stage, _name(DAMAGED)))
    stage.add(DAMAGED + timedelta(days=2, minutes=10), nothing)
    pin = {"by": "mara", "at": "2026-09-30T07:12:00+00:00"}
    (folder / "backups" / f"{_name(PINNED)}{PIN}").write_text(json.dumps(pin) + "\n")


def _name(taken: datetime) -> str:
    return f"backup_{taken.strftime(STAMP)}.backup.gz"


def _facts(taken: datetime, made: Made) -> Facts:
    days = (LAST - taken).days
    name = _name(taken)
    return Facts(
        name,
        taken,
        kind="sqlite",
        database="app.db",
        revision="app_0004",
        size=SIZE - days * 3_113_021,
        rows=ROWS - days * 38_417,
        tables=TABLES,
        taken_by_run=made.run["id"],
        manifest=hashlib.sha256(name.encode()).hexdigest(),
    )


async def _record(stage: Stage, facts: Facts) -> None:
    async with stage.ledger.engine.begin() as connection:
        await backups.record(connection, facts, FOLDER, clock.now(), is_new=True)
        await backups.mark_verified(connection, facts.name, FOLDER, CHECKSUMS, clock.now())


async def _verify(stage: Stage, name: str, how: str) -> None:
    async with stage.ledger.engine.begin() as connection:
        await backups.mark_verified(connection, name, FOLDER, how, clock.now())


async def _fail(stage: Stage, name: str) -> None:
    async with stage.ledger.engine.begin() as connection:
        why = "block 1,204 has another checksum than its manifest says"
        await backups.mark_failed(connection, name, FOLDER, why, clock.now())


async def _remove(stage: Stage, name: str) -> None:
    async with stage.ledger.engine.begin() as connection:
        await backups.remove(connection, name, FOLDER)
