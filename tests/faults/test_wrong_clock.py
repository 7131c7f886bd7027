"""The clock that the fault suite sets wrong: without it, its findings about clocks would mean
nothing. About 4 s.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from batch_system import Retry, clock
from batch_system.batch.ledger import database_time
from batch_system.database.engine import Database
from batch_system.testing.engine import DrivenEngine
from tests.batch.ledger_world import NODE, know, make_task, rows
from tests.batch.test_runs import insert, new
from tests.faults.wrong_clock import SERVE, WrongClock, wrong_datetime
from tests.processes import batch, environment, service

TELLS = """
from datetime import UTC, datetime
from pathlib import Path
from batch_system import clock
from tests.faults.wrong_clock import set_wrong
set_wrong(Path({file!r}))
for file_says in ("0", "3600", "-90.5"):
    open({file!r}, "w").write(file_says)
    real = datetime.now(UTC).timestamp()
    durations = round(clock.boottime() - clock.time.clock_gettime(clock.time.CLOCK_BOOTTIME), 1)
    wall = round(clock.now().timestamp() - real)
    print(wall, round(clock.unix_ns() / 1e9 - real), durations + 0.0)
"""

YEARLY = """
from batch_system import BaseTask

class YearlyTask(BaseTask):
    name, schedule = "yearly", "@yearly"

    async def run(self):
        pass
"""


def test_a_file_sets_the_wall_clock_wrong_and_no_other(tmp_path: Path) -> None:
    script = TELLS.format(file=str(tmp_path / "clock"))
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.splitlines() == ["0 0 0.0", "3600 3600 0.0", "-90 -90 0.0"]


def test_a_clock_that_can_not_be_read_is_an_error_and_not_the_right_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "datetime", wrong_datetime(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError):
        clock.now()


def test_a_service_that_lives_fires_by_the_stepped_clock(tmp_path: Path) -> None:
    """On SQLite, where the ledger's time is the machine's. The step makes a slot due that is far
    away.
    """
    (tmp_path / "tasks/yearly.py").write_text(YEARLY)
    new_year = datetime(datetime.now(UTC).year + 1, 1, 1, tzinfo=UTC)
    wrong = WrongClock(tmp_path / "clock")
    with service(tmp_path, SERVE, wrong.settings) as ours:
        wrong.set((new_year - datetime.now(UTC)).total_seconds() + 1)
        give_up_at = time.monotonic() + 20
        while not (runs := json.loads(batch(tmp_path, "runs", "--json").stdout)):
            assert time.monotonic() < give_up_at, ours.stderr
            time.sleep(0.1)
    assert datetime.fromisoformat(runs[0]["slot"]) == new_year


@pytest.mark.parametrize(("before", "after"), [(-3600, -3600), (3600, 3600), (0, -3600), (0, 3600)])
async def test_a_retry_is_due_by_the_ledgers_time(
    ledger: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    """Not by that of a node whose clock is wrong, or steps meanwhile: it would come at once, or an
    hour too late.
    """

    async def run(self: object) -> None:
        node.set(after)
        raise ConnectionError

    node = WrongClock(tmp_path / "clock", before)
    monkeypatch.setattr(clock, "datetime", wrong_datetime(tmp_path / "clock"))
    loaded = await know(
        ledger, make_task("t", None, run=run, retry=Retry(attempts=2, wait=30, jitter=0))
    )
    await insert(ledger, new())
    await DrivenEngine(ledger, loaded, NODE).settle()
    async with ledger.engine.connect() as connection:
        now = await database_time.now_of(connection)
    (found,) = await rows(ledger)
    assert found["state"] == "retrying"
    assert now + timedelta(seconds=20) < found["due_at"] <= now + timedelta(seconds=30)
