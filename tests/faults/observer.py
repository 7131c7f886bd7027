"""Reads the ledger while the services are disturbed: `python -m tests.faults.observer URL FILE`,
until it is killed.

Each final state of a run is a line in FILE as soon as it is seen, and so is that a run has left
one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from batch_system.batch.ledger.states import FINAL
from batch_system.database.engine import Database
from batch_system.errors import DatabaseError
from tests.processes import environment

LOOK_SECONDS = 0.3
STATES = text("SELECT id, state, fence, finished_at FROM batch_runs")


async def look(database: Database) -> dict[str, tuple[Any, ...]]:
    """The state of each run, with its fence and when it ended."""
    async with database.reader.connect() as connection:
        return {
            str(row[0]): (row[1], row[2], str(row[3])) for row in await connection.execute(STATES)
        }


async def observe(url: str, file: Path) -> None:
    database = Database(url, setting="LEDGER_URL", pool_size=1)
    known: dict[str, tuple[Any, ...]] = {}
    with file.open("a") as out:
        while True:
            # It is down, or not made yet.
            with contextlib.suppress(DBAPIError, DatabaseError, OSError):
                async with asyncio.timeout(5):
                    for run, state in (await look(database)).items():
                        _note(known, run, state, out)
                out.flush()
            await asyncio.sleep(LOOK_SECONDS)


def _note(known: dict[str, tuple[Any, ...]], run: str, state: tuple[Any, ...], out: Any) -> None:
    is_final = state[0] in FINAL
    if is_final and known.get(run) != state:
        known[run] = state
        print(json.dumps({"run": run, "state": state}), file=out)
    elif not is_final and run in known:
        del known[run]
        print(json.dumps({"run": run, "state": None}), file=out)


def changes(file: Path, last: dict[str, tuple[Any, ...]]) -> dict[str, list[Any]]:
    """The final states that each run was seen in, one after the other; `last`: those of the end."""
    seen: dict[str, list[Any]] = {}
    for line in file.read_text().splitlines():
        told = json.loads(line)
        if told["state"] is not None:
            seen.setdefault(told["run"], []).append(told["state"])
    for run, state in last.items():
        if seen.get(run, [None])[-1] != list(state):
            seen.setdefault(run, []).append(list(state))
    return seen


@contextmanager
def observer(url: str, file: Path) -> Iterator[None]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults.observer", url, str(file)], env=environment()
    ) as process:
        try:
            yield
            assert process.poll() is None, "the observer has ended"
        finally:
            process.kill()


if __name__ == "__main__":
    asyncio.run(observe(sys.argv[1], Path(sys.argv[2])))
