"""The parameter with the annotation Upstream: results of slots and of members, in this process and
in a child.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from batch_system import BaseTask, Done, Start, Upstream, call_async, clock, start_all
from batch_system.batch.context.upstream import no_members
from batch_system.batch.ledger import waits as waits_rows
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.queue import upstream_results
from batch_system.batch.queue.enqueue import use_no_service, use_service
from batch_system.batch.tasks.registry import TaskRegistry
from batch_system.database.engine import Database
from batch_system.errors import InvalidParameters
from batch_system.server.service import BatchService
from tests.batch.ledger_world import make_task, rows
from tests.pools.world import pool_of
from tests.waiting.test_service import ended
from tests.waiting.test_service import service as service
from tests.waiting.world import MINUTE, Waits


async def extract(self: BaseTask, day: str = "monday") -> dict[str, Any]:
    return {"file": f"{day}.csv"}


async def test_a_run_gets_the_results_of_the_slots_that_it_has_waited_for(
    service: BatchService,
) -> None:
    async def load(self: BaseTask, upstream: Upstream) -> list[Any]:
        done = upstream["extract"]
        assert done.run is not None and done.slot is not None and list(upstream) == ["extract"]
        assert [done async for done in upstream] == []
        return [done.task, done.state, done.result["file"], done.params]

    make_task("extract", "* * * * *", run=extract)
    make_task("load", None, run=load, after="extract")
    await service.start()
    clock.advance(MINUTE)
    assert (await ended(service, "load"))["result"] == ["extract", "succeeded", "monday.csv", {}]


async def test_a_sync_follow_up_gets_the_results_of_its_members(service: BatchService) -> None:
    async def results(upstream: Upstream) -> list[Any]:
        return [(done.params["day"], done.result["file"]) async for done in upstream]

    def report(self: BaseTask, upstream: Upstream) -> list[Any]:
        assert len(upstream) == 0
        return call_async(results(upstream))

    member, follow_up = (
        make_task("extract", None, run=extract, overlap="allow"),
        make_task("report", None, run=report),
    )
    await service.start()
    await start_all(
        [Start(member.cls, day=day) for day in ("monday", "friday")], then=Start(follow_up.cls)
    )
    assert (await ended(service, "report"))["result"] == [
        ["monday", "monday.csv"],
        ["friday", "friday.csv"],
    ]


async def test_members_come_page_by_page_and_a_page_is_bounded(
    waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    mail, report = make_task("mail", None), make_task("report", None)
    await waits.know(mail, report)
    follow_up = await start_all(
        [Start(mail.cls, params={}) for _ in range(7)], then=Start(report.cls)
    )
    assert follow_up is not None
    members = sorted(row["id"] for row in await rows(waits.ledger, task="mail"))
    monkeypatch.setattr(waits_rows, "PAGE", 3)
    sizes = []
    after: str | None = None
    while page := await upstream_results.members(follow_up, after):
        sizes.append(len(page))
        after = page[-1].run
    assert sizes == [3, 3, 1]
    await waits.start(members[0])
    await waits.finish(members[0], result={"text": "x" * 100})
    monkeypatch.setattr(waits_rows, "PAGE_SIZE", 50)
    assert [
        len(await upstream_results.members(follow_up, each)) for each in (None, members[0])
    ] == [
        1,
        3,
    ]
    upstream = await upstream_results.read(follow_up)
    assert [done.run async for done in upstream] == members


async def test_a_slot_without_a_run_is_there_without_a_state(waits: Waits) -> None:
    weekly, load = (
        make_task("extract", "0 3 * * 0"),
        make_task("load", "0 3 * * *", after="extract"),
    )
    await waits.know(weekly, load)
    await waits.fire(clock.now() + 180 * MINUTE)
    run = (await waits.run_of("load"))["id"]
    assert (await upstream_results.read(run))["extract"] == Done("extract", None, None, None)


async def test_a_name_that_it_has_not_waited_for_is_an_error_that_says_what_there_is() -> None:
    done = Done("extract", new_id(), None, RunState.SUCCEEDED)
    with pytest.raises(KeyError, match="has not waited for a task 'rates'; there is: extract"):
        Upstream([done])["rates"]
    with pytest.raises(KeyError, match="it has waited for no slot"):
        Upstream()["extract"]
    assert Upstream([done]).get("rates") is None
    assert await no_members(None) == ()


def test_upstream_is_not_a_parameter_that_a_person_gives() -> None:
    async def load(self: BaseTask, upstream: Upstream, day: str = "monday") -> None: ...

    parameters = make_task("load", "* * * * *", run=load).parameters
    assert (parameters.names, parameters.required, list(parameters.written)) == (
        ("day",),
        (),
        ["day"],
    )
    schema = parameters.json_schema()
    assert schema is not None and list(schema["properties"]) == ["day"]
    with pytest.raises(InvalidParameters, match="there is no parameter 'upstream'"):
        parameters.to_json({"upstream": {}})
    assert "upstream" in inspect.signature(load).parameters


TASKS = """
from batch_system import Upstream

class Load(_Pooled):
    name = "load"
    async def run(self, upstream: Upstream) -> list:
        slots = [[done.task, done.state, done.result, str(done.slot)] for done in upstream.values()]
        return [slots, [done.result async for done in upstream]]
"""


async def test_a_child_gets_them_from_its_service(waits: Waits, application: Database) -> None:
    async with pool_of(TASKS) as world:
        task = TaskRegistry.get("load")
        await waits.know(
            make_task("extract", "0 3 * * *"), make_task("member", None, overlap="allow"), task
        )
        waits.tasks["extract"] = TaskRegistry.get("extract")
        use_service(waits.ledger, lambda: None)
        await waits.fire(clock.now() + 180 * MINUTE)
        await waits.end("extract")
        follow_up = await start_all(
            [Start(TaskRegistry.get("member").cls)] * 3, then=Start(task.cls)
        )
        assert follow_up is not None
        for row in await rows(waits.ledger, task="member"):
            await waits.start(row["id"])
            await waits.finish(row["id"], result={"n": 1})
        extract = await waits.run_of("extract")
        from batch_system.batch.ledger import json_rows
        from batch_system.batch.ledger.waits import waits as table

        async with waits.ledger.engine.begin() as connection:
            await json_rows.insert(
                connection, table, [{"run": follow_up, "task": "extract", "slot": extract["slot"]}]
            )
        ending = await world.ending_of("load", id=follow_up)
        slots = [["extract", "succeeded", None, "2026-03-10 03:00:00+00:00"]]
        assert ending.state == RunState.SUCCEEDED, ending
        assert ending.result == [slots, [{"n": 1}] * 3]
    use_no_service()
