"""Faults of a Dask cluster, with real processes: workers, schedulers and services are killed or are
wrong.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from distributed import Client

from batch_system.batch.ledger import tables
from tests.batch.ledger_world import rows, until
from tests.dask.world import Place
from tests.processes import free_port, freeze, process, suspend

ALL = list(range(40))


async def test_the_run_of_a_killed_worker_is_resumed_by_another_one(place: Place) -> None:
    cluster = place.cluster()
    place.serve(cluster)
    await place.nodes(2)
    (run,) = await place.queue("long")
    worker = await place.pid(run)
    await until(place.done)
    os.kill(worker, signal.SIGKILL)
    row = await place.ended(run)
    assert (row["state"], row["fence"], row["attempt"], await place.done()) == (
        "succeeded",
        2,
        1,
        ALL,
    )
    assert row["result"] != worker
    [lost] = await rows(place.ledger, tables.nodes, pid=worker)
    assert lost["lost_at"] is not None
    await place.nodes(2)  # the nanny has started another worker


@pytest.mark.nightly
async def test_a_ticket_whose_worker_dies_before_it_claims_is_placed_again(place: Place) -> None:
    cluster = place.cluster(workers=1)
    place.serve(cluster)
    (node,) = await place.nodes(1)
    await place.queue("empty", exclusive=None)
    await place.all_ended("empty", 1)
    suspend(node["pid"])  # so that the ticket reaches the worker and is not executed
    (run,) = await place.queue("urgent")
    async with Client(cluster.address.replace("dask", "tcp"), asynchronous=True) as client:

        async def given() -> bool:
            return any(
                "urgent" in str(key)
                for keys in (await client.processing()).values()
                for key in keys
            )

        await until(given)
    os.kill(node["pid"], signal.SIGKILL)
    row = await place.ended(run)
    assert (row["state"], row["fence"]) == ("succeeded", 1)
    assert row["result"] != node["pid"]


@pytest.mark.rest
async def test_the_run_of_a_frozen_worker_is_resumed_by_another_one_when_its_lease_is_over(
    place: Place,
) -> None:
    cluster = place.cluster(LEASE_SECONDS="3")
    place.serve(cluster, LEASE_SECONDS="3")
    await place.nodes(2)
    (run,) = await place.queue("long")
    worker = await place.pid(run)
    await until(place.done)
    freeze(worker, place.settings["LEDGER_URL"], place.settings["DATABASE_URL"])
    row = await place.ended(run)
    assert (row["state"], row["attempt"], await place.done()) == ("succeeded", 1, ALL)
    assert row["result"] != worker
    os.kill(worker, signal.SIGKILL)


@pytest.mark.nightly
async def test_a_worker_that_is_frozen_when_the_service_starts_does_not_keep_the_others_from_work(
    place: Place,
) -> None:
    cluster = place.cluster(workers=2)
    async with Client(cluster.address.replace("dask", "tcp"), asynchronous=True) as client:
        frozen, _ = (await client.run(os.getpid)).values()
    suspend(frozen)
    served = place.serve(cluster)
    await place.queue("empty", 10, exclusive=None)
    ended = await place.all_ended("empty", 10)
    assert frozen not in {row["result"] for row in ended}
    served.wait_until_said("does not answer, and gets no node")
    os.kill(frozen, signal.SIGKILL)
    await place.nodes(2)


@pytest.mark.nightly
async def test_another_service_places_when_the_one_that_places_is_killed(place: Place) -> None:
    cluster = place.cluster(workers=1)
    services = [place.serve(cluster) for _ in range(2)]
    await place.nodes(1)
    await place.queue("empty", exclusive=None)
    await place.all_ended("empty", 1)
    holder = await placing_node(place)
    (placing,) = [served for served in services if served.process.pid == holder["pid"]]
    placing.process.kill()
    await place.queue("empty", 50, exclusive=None)
    await place.all_ended("empty", 51)
    assert (await placing_node(place))["id"] != holder["id"]


async def placing_node(place: Place) -> dict[str, object]:
    from batch_system.batch.ledger.duties import duties

    (duty,) = await rows(place.ledger, duties, name="tickets")
    (node,) = await rows(place.ledger, tables.nodes, id=duty["node"])
    return node


SCHEDULER = (
    sys.executable,
    "-m",
    "distributed.cli.dask_scheduler",
    "--host",
    "127.0.0.1",
    "--no-dashboard",
)
WORKER = (
    sys.executable,
    "-m",
    "distributed.cli.dask_worker",
    "--nthreads",
    "2",
    "--no-dashboard",
    "--no-nanny",
)


@pytest.mark.nightly
async def test_runs_that_a_killed_scheduler_interrupts_continue_with_the_next_scheduler(
    place: Place,
) -> None:
    port = free_port()
    scheduler, worker = (*SCHEDULER, "--port", str(port)), (*WORKER, f"tcp://127.0.0.1:{port}")
    with (
        process(place.folder, scheduler, place.settings) as first,
        process(place.folder, worker, place.settings) as one,
    ):
        served = place.serve(f"dask://127.0.0.1:{port}")
        await place.nodes(1)
        (run,) = await place.queue("long")
        await place.pid(run)
        await until(place.done)
        first.process.kill()
        assert (await place.in_state(run, "interrupted"))["reason"] == "the service stops"
        one.process.wait(20)
        served.wait_until_said("can't be reached, so runs of its pools wait")
    with (
        process(place.folder, scheduler, place.settings),
        process(place.folder, worker, place.settings),
    ):
        row = await place.ended(run)
        assert (row["state"], row["attempt"], await place.done()) == ("succeeded", 1, ALL)
        served.wait_until_said("is reached again")


@pytest.mark.nightly
async def test_sigterm_drains_a_worker(place: Place) -> None:
    port = free_port()
    with process(place.folder, (*SCHEDULER, "--port", str(port)), place.settings):
        place.serve(f"dask://127.0.0.1:{port}")
        nanny = tuple(word for word in WORKER if word != "--no-nanny")
        with process(place.folder, (*nanny, f"tcp://127.0.0.1:{port}"), place.settings) as worker:
            await place.nodes(1)
            (run,) = await place.queue("long")
            await place.pid(run)
            await until(place.done)
            worker.stop(within=20)
            (row,) = await rows(place.ledger, id=run)
            assert (row["state"], row["reason"]) == ("interrupted", "the service stops")
            (node,) = await rows(place.ledger, tables.nodes, fires=False)
            assert (node["stopped_at"] is not None, node["lost_at"]) == (True, None)


@pytest.mark.nightly
async def test_a_worker_without_the_ledger_says_why_and_gets_no_ticket(place: Place) -> None:
    missing = place.folder / "nowhere.db"
    cluster = place.cluster(workers=1, LEDGER_URL=f"sqlite+aiosqlite:///{missing}")
    served = place.serve(cluster)
    served.wait_until_said("a worker of the Dask scheduler")
    served.wait_until_said("there is no ledger yet")
    assert not missing.exists()
    (run,) = await place.queue("empty")
    place.cluster(workers=1)
    (row,) = await rows(place.ledger, id=run)
    assert row["state"] == "queued"
    assert "Traceback" not in served.stderr


@pytest.mark.nightly
async def test_a_worker_without_the_task_gets_no_ticket_for_it(place: Place) -> None:
    elsewhere = place.folder.parent / "elsewhere"
    (elsewhere / "tasks").mkdir(parents=True)
    text = (place.folder / "tasks/all.py").read_text()
    (elsewhere / "tasks/all.py").write_text(text.replace('"urgent"', '"unknown"'))
    cluster = place.cluster(workers=1, folder=elsewhere)
    served = place.serve(cluster)
    await place.nodes(1)
    (urgent,) = await place.queue("urgent")
    await place.queue("empty", exclusive=None)
    await place.all_ended("empty", 1)
    served.wait_until_said("no worker of pool cpu has task urgent")
    (row,) = await rows(place.ledger, id=urgent)
    assert row["state"] == "queued"
    (elsewhere / "tasks/urgent.py").write_text(
        text.replace("class ", "class More").replace('"urgent"', '"urgent"')
    )
    assert (await place.ended(urgent))["state"] == "succeeded"


@pytest.mark.nightly
async def test_workers_without_this_package_or_with_an_older_one_do_other_work(
    place: Place, tmp_path: Path
) -> None:
    (tmp_path / "image/service").mkdir(parents=True)
    (tmp_path / "image/service/__init__.py").write_text("")
    root = str(Path(__file__).parent.parent.parent)
    cluster = place.cluster(workers=1, PYTHONPATH=f"{tmp_path / 'image'}{os.pathsep}{root}")
    served = place.serve(cluster)
    (run,) = await place.queue("empty")

    async with Client(
        cluster.address.replace("dask", "tcp"), asynchronous=True, set_as_default=False
    ) as client:

        async def has_plugin() -> bool:
            plugins = await client.run(lambda dask_worker: sorted(dask_worker.plugins))
            return any(
                name.startswith("batch-node") for names in plugins.values() for name in names
            )

        await until(has_plugin)
        assert await client.submit(sum, [1, 2]) == 3
    (row,) = await rows(place.ledger, id=run)
    assert row["state"] == "queued"
    assert "Traceback" not in served.stderr


@pytest.mark.nightly
async def test_a_worker_on_another_ledger_executes_nothing_of_it(
    place: Place, ledger_copy: str
) -> None:
    cluster = place.cluster(workers=1, LEDGER_URL=ledger_copy)
    served = place.serve(cluster)
    (run,) = await place.queue("empty")
    served.wait_until_said("is not that of the service that has placed a ticket")
    (row,) = await rows(place.ledger, id=run)
    assert row["state"] == "queued"


@pytest.fixture
async def ledger_copy(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A ledger that is not that of the service."""
    from batch_system.batch.ledger.migration import LEDGER_HISTORY

    databases = request.getfixturevalue("sqlite_databases")
    return str(await databases.make(tmp_path / "other.db", LEDGER_HISTORY))
