"""The recorded wheel, which knows no dates without slots, beside code that leaves out dates. In
real processes, about 30 s for each kind of database.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from batch_system import clock
from batch_system.batch.ledger import tables
from tests.outages import until
from tests.upgrade.test_side_by_side import WAIT, Versions
from tests.upgrade.test_side_by_side import versions as versions

SECOND = timedelta(seconds=1)
TASKS = """
from datetime import UTC, date, datetime, timedelta

from batch_system import BaseTask

TODAY = datetime.now(UTC).date()


class TickTask(BaseTask):
    name, schedule, overlap = "tick", "* * * * * *", "allow"

    async def run(self): ...


class DatedTask(BaseTask):
    name, schedule, overlap = "dated", "* * * * * *", "allow"
    except_on = date(2020, 1, 1)

    async def run(self): ...


class ClosedTask(BaseTask):
    name, schedule, overlap = "closed", "* * * * * *", "allow"
    except_on = [TODAY + timedelta(days=number) for number in (0, 1)]

    async def run(self): ...
"""


def slots(versions: Versions, task: str, since: datetime) -> list[Any]:
    return [run["slot"] for run in versions.case.rows(task=task) if run["slot"] > since]


@pytest.mark.nightly
def test_an_older_node_fires_no_slot_of_a_task_that_leaves_out_dates(versions: Versions) -> None:
    (file,) = (versions.case.folder / "tasks").glob("*.py")
    file.write_text(TASKS)
    older = versions.start("old")
    until(lambda: versions.case.rows(task="closed"), WAIT, "a slot that the older code fired")
    newer = versions.start("next")
    opened = {
        row["task"]: row
        for row in versions.case.rows(tables.schedules)
        if row["valid_until"] is None
    }
    assert " EXCEPT " in opened["dated"]["cron"] and " EXCEPT " in opened["closed"]["cron"]
    since = opened["closed"]["valid_from"]
    until(lambda: len(slots(versions, "dated", since)) >= 5, WAIT, "slots of the newer node")
    newer.process.kill()
    newer.process.wait()
    alone = clock.now() + SECOND
    until(lambda: len(slots(versions, "tick", alone)) >= 5, WAIT, "slots of the older node")
    assert slots(versions, "dated", alone) == []
    newer = versions.start("next")
    again = clock.now()
    until(lambda: len(slots(versions, "dated", again)) >= 3, WAIT, "slots of the newer node")
    assert slots(versions, "closed", since) == []
    for service in (older, newer):
        assert "Traceback" not in service.stderr, service.stderr
        service.stop(within=30)
    code, said = versions.call("next", "account", "--since", "1h")
    assert code == 0, said
    assert "left out closed" in said
