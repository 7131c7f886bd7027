"""Runs on a Dask cluster with real worker processes behave as everywhere else."""

from __future__ import annotations

from collections import Counter

import pytest
from distributed import Client
from sqlalchemy import func, select

from batch_system import clock
from batch_system.batch.ledger import tables
from batch_system.batch.ledger.duties import duties
from tests.batch.ledger_world import rows, until
from tests.dask.world import Place
from tests.processes import batch


@pytest.mark.nightly
async def test_runs_of_two_services_execute_once_in_the_workers_of_a_cluster_the_urgent_one_first(
    place: Place,
) -> None:
    """Two services place tickets for 300 runs, and one of them holds the duty. Cancel, pause and
    logs work as everywhere.
    """
    cluster = place.cluster()
    services = [place.serve(cluster) for _ in range(2)]
    workers = {node["pid"] for node in await place.nodes(2)}
    assert [node["pools"] for node in await place.nodes(2)] == [["cpu"]] * 2
    assert {node["capacity"] for node in await place.nodes(2)} == {2}
    await place.queue("empty", 300, exclusive=None)
    (urgent,) = await place.queue("urgent", priority=9)
    started = (await place.ended(urgent))["started_at"]
    ended = await place.all_ended("empty", 300)
    assert {run["result"] for run in ended} <= workers and {run["fence"] for run in ended} == {1}
    assert sum(run["started_at"] > started for run in ended) > 50
    assert not {served.process.pid for served in services} & {run["result"] for run in ended}
    [duty] = await rows(place.ledger, duties, name="tickets")
    assert duty["node"] in {row["id"] for row in await rows(place.ledger, tables.nodes, fires=True)}
    await it_is_cancelled_and_paused_as_everywhere(place)


async def it_is_cancelled_and_paused_as_everywhere(place: Place) -> None:
    settings = place.settings
    (sleeping,) = await place.queue("sleeping")
    await place.pid(sleeping)
    assert batch(place.folder, "cancel", sleeping, settings=settings).returncode == 0
    assert (await place.ended(sleeping))["state"] == "cancelled"
    (long,) = await place.queue("long")
    pid = await place.pid(long)
    await until(place.done)
    assert batch(place.folder, "pause", "long", settings=settings).returncode == 0
    await place.in_state(long, "interrupted")
    assert batch(place.folder, "resume", "long", settings=settings).returncode == 0
    row = await place.ended(long)
    assert (row["state"], row["attempt"], await place.done()) == ("succeeded", 1, list(range(40)))
    assert pid in {node["pid"] for node in await place.nodes(2)}
    assert row["count"] == 40


@pytest.mark.nightly
async def test_slots_of_a_task_on_dask_are_fired_by_the_service_and_executed_in_a_worker(
    place: Place,
) -> None:
    cluster = place.cluster(workers=1)
    served = place.serve(cluster)
    (worker,) = await place.nodes(1)
    ended = await until(lambda: rows(place.ledger, task="tick", state="succeeded"))
    assert ended[0]["result"] == worker["pid"] and ended[0]["slot"] is not None
    served.stop()


@pytest.mark.nightly
async def test_a_task_whose_memory_no_worker_has_waits_and_the_service_says_why(
    place: Place,
) -> None:
    cluster = place.cluster(workers=1)
    served = place.serve(cluster)
    await place.nodes(1)
    (large,) = await place.queue("large")
    served.wait_until_said("no worker of pool cpu has the memory of task large")
    (run,) = await rows(place.ledger, id=large)
    assert run["state"] == "queued"
    assert Counter(served.stderr.splitlines()).most_common(1)[0][1] == 1


@pytest.mark.nightly
async def test_ten_thousand_runs_keep_no_urgent_one_waiting_and_leave_nothing_behind(
    place: Place,
) -> None:
    """The lease is the usual one: nobody is killed, and a busy machine may keep a heartbeat waiting
    for seconds.
    """
    place.settings |= {"LEASE_SECONDS": "30", "HEARTBEAT_SECONDS": "5"}
    cluster = place.cluster(places=4)
    place.serve(cluster)
    await place.nodes(2)
    await place.queue("empty", 10_000, exclusive=None)
    of_both = tables.runs.c.task.in_(("empty", "urgent"))  # another task runs each second
    ended = (
        select(func.count())
        .select_from(tables.runs)
        .where(tables.runs.c.state == "succeeded", of_both)
    )

    async def number() -> int:
        async with place.ledger.reader.connect() as connection:
            return int((await connection.execute(ended)).scalar_one())

    async def some() -> bool:
        return await number() > 500

    await until(some)
    asked_at = clock.now()
    (urgent,) = await place.queue("urgent", priority=9)
    waited = (await place.ended(urgent))["started_at"] - asked_at
    assert waited.total_seconds() < 5 and await number() < 10_000

    async def all_of_them() -> bool:
        return await number() == 10_001

    await until(all_of_them, 600)
    assert {run["fence"] for run in await rows(place.ledger, task="empty")} == {1}
    async with Client(
        cluster.address.replace("dask", "tcp"), asynchronous=True, set_as_default=False
    ) as client:

        async def nothing_is_left() -> bool:
            return not await client.run_on_scheduler(
                lambda dask_scheduler: len(dask_scheduler.tasks)
            )

        await until(nothing_is_left)
