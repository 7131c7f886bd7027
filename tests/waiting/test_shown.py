"""What people see of runs that wait."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from batch_system import Start, clock, start, start_all
from batch_system.batch.ledger import database_time
from batch_system.operations.runs import late
from batch_system.operations.runs.waiting import Waiting
from tests.batch.ledger_world import make_task, rows
from tests.waiting.test_after import THREE
from tests.waiting.world import MINUTE, START, Waits


async def shown(waits: Waits, run: str) -> Waiting:
    async with waits.ledger.reader.connect() as connection:
        found = await late.waiting_of(connection, run, [], await database_time.now_of(connection))
    assert found is not None
    return found


async def awaits(waits: Waits, run: str) -> list[dict[str, Any]]:
    return [each.model_dump(exclude_none=True) for each in (await shown(waits, run)).awaits]


async def test_a_run_that_begins_later_says_when(waits: Waits) -> None:
    mail = make_task("mail", None)
    await waits.know(mail)
    run = await start(mail.cls, delay=60)
    assert await awaits(waits, run) == [{"kind": "instant", "at": START + MINUTE}]
    clock.advance(MINUTE)
    await waits.look()
    assert await awaits(waits, run) == []


async def test_a_follow_up_says_how_many_of_its_group_are_not_over(waits: Waits) -> None:
    mail, report = make_task("mail", None, overlap="allow"), make_task("report", None)
    await waits.know(mail, report)
    follow_up = await start_all(
        [Start(mail.cls), Start(mail.cls), Start(mail.cls)], then=Start(report.cls)
    )
    assert follow_up is not None
    first = (await rows(waits.ledger, task="mail"))[0]["id"]
    await waits.start(first)
    await waits.finish(first)
    assert await awaits(waits, follow_up) == [{"kind": "group", "active": 2, "members": 3}]


async def test_a_slot_names_the_slots_that_are_not_over_with_their_runs(waits: Waits) -> None:
    extract = make_task("extract", "0 3 * * *")
    await waits.know(extract, make_task("load", None, after="extract"))
    clock.advance(THREE - clock.now())
    del waits.tasks["extract"]
    await waits.fire(THREE)
    load = (await waits.run_of("load"))["id"]
    assert await awaits(waits, load) == [{"kind": "slot", "at": THREE, "task": "extract"}]
    waits.tasks["extract"] = extract
    await waits.fire(THREE + timedelta(seconds=1))
    run = (await waits.run_of("extract"))["id"]
    slot = {"kind": "slot", "at": THREE, "task": "extract", "run": run, "state": "queued"}
    assert await awaits(waits, load) == [slot]
    await waits.end("extract")
    assert await awaits(waits, load) == []
