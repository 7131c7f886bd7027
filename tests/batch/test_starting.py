"""start(): runs that are queued by code."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from batch_system import BaseTask, TaskRegistry, call_async, config, current_run, start
from batch_system.config import get_settings
from batch_system.errors import DatabaseError, InvalidParameters, UnknownTask
from batch_system.server.service import BatchService
from tests.batch.ledger_world import know, rows, until

SLOT = datetime(2026, 11, 25, 2, 0, tzinfo=UTC)


class Greet(BaseTask):
    """Say hello to somebody."""

    name = "greet"
    schedule = None

    async def run(self, whom: str = "world", slot: datetime | None = None) -> str:
        return f"hello {whom} of {slot}"


class Welcome(BaseTask):
    """Starts another task."""

    name = "welcome"
    schedule = None

    async def run(self) -> str:
        return await start(Greet, whom=current_run().task)


class WelcomeInAThread(BaseTask):
    name = "welcome_in_a_thread"
    schedule = None

    def run(self) -> str:
        return call_async(start(Greet, whom="thread"))


@pytest.fixture
async def batch(monkeypatch: pytest.MonkeyPatch, ledger_url: str) -> AsyncIterator[BatchService]:
    """A service that polls only once a minute, so that a run which starts soon must have been
    started by a wake.
    """
    monkeypatch.setenv("LEDGER_URL", ledger_url)
    monkeypatch.setenv("POLL_SECONDS", "60")
    config.forget_settings()
    for task in (Greet, Welcome, WelcomeInAThread):
        TaskRegistry.register(task)
    service = BatchService(get_settings())
    await service.start()
    yield service
    await service.stop()


async def ended(batch: BatchService, run_id: str) -> dict[str, object]:
    async def found() -> dict[str, object] | None:
        [row] = await rows(batch.ledger, id=run_id)
        return row if row["finished_at"] else None

    row: dict[str, object] = await until(found)
    return row


async def test_a_started_run_runs_at_once_with_its_parameters_and_slot(batch: BatchService) -> None:
    row = await ended(batch, await start(Greet, whom="you", slot=SLOT))
    assert (row["state"], row["origin"], row["slot"], row["params"]) == (
        "succeeded",
        "manual",
        SLOT,
        {"whom": "you"},
    )
    assert row["result"] == f"hello you of {SLOT}"
    assert (row["parent"], row["requested_by"], row["key"]) == (None, None, None)


@pytest.mark.parametrize("parent", [Welcome, WelcomeInAThread])
async def test_a_run_started_by_a_run_names_its_parent(
    batch: BatchService, parent: type[BaseTask]
) -> None:
    parent_id = await start(parent)
    child = await ended(batch, str((await ended(batch, parent_id))["result"]))
    assert (child["task"], child["state"], child["parent"]) == ("greet", "succeeded", parent_id)
    assert child["requested_by"] == f"task {TaskRegistry.of(parent).name}"


async def test_concurrent_starts_with_the_same_key_make_one_run(batch: BatchService) -> None:
    ids = await asyncio.gather(*(start(Greet, key="order 7", whom=f"{n}") for n in range(10)))
    assert len(set(ids)) == 1
    await ended(batch, ids[0])
    assert await start(Greet, key="order 7") == ids[0]
    assert await start(Greet, key="order 8") != ids[0]
    assert await start(Welcome, key="order 7") != ids[0]
    assert len(await rows(batch.ledger, task="greet", key="order 7")) == 1


@pytest.mark.rest
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"who": "x"},
            r"parameters of task greet: there is no parameter 'who' \(it takes whom, slot\)",
        ),
        ({"whom": 7}, r"whom is 7: Input should be a valid string"),
        ({"key": ""}, r"start\(greet\): key is ''; allowed: 1 to 200 characters"),
        ({"key": "k" * 201}, "allowed: 1 to 200 characters"),
        ({"slot": datetime(2026, 1, 1)}, r"start\(greet\): slot is .*; allowed: an aware datetime"),
        (
            {"slot": datetime.max.replace(tzinfo=UTC)},
            "allowed: an aware datetime of the years 1901 to 8999",
        ),
    ],
)
async def test_invalid_arguments_are_refused_before_anything_is_written(
    batch: BatchService, given: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidParameters, match=message):
        await start(Greet, **given)  # type: ignore[arg-type]
    assert await rows(batch.ledger) == []


async def test_a_task_that_no_service_has_loaded_is_refused(batch: BatchService) -> None:
    class Late(BaseTask):
        name = "late"
        schedule = None

        async def run(self) -> None: ...

    with pytest.raises(
        UnknownTask, match=r"late: no service has loaded this task, which is in .*test_start"
    ):
        await start(Late)


async def test_a_parameter_that_has_the_name_of_an_argument_of_start_is_given_in_params(
    batch: BatchService,
) -> None:
    class Keyed(BaseTask):
        name = "keyed"
        schedule = None

        async def run(self, key: str = "") -> None: ...

    TaskRegistry.register(Keyed)
    await know(batch.ledger, TaskRegistry.get("keyed"))
    with pytest.raises(
        InvalidParameters, match=r"give the parameters of run\(\) as params=\{'key': …\}"
    ):
        await start(Keyed, key="a")
    with pytest.raises(
        InvalidParameters, match="params has to be a dict with all parameters of run"
    ):
        await start(Keyed, params=["key"])  # type: ignore[arg-type]
    run = await start(Keyed, key="first", params={"key": "a"})
    (row,) = await rows(batch.ledger, id=run)
    assert (row["key"], row["params"]) == ("first", {"key": "a"})


async def test_a_process_without_a_service_queues_runs_for_one(
    ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEDGER_URL", ledger_url)
    config.forget_settings()
    TaskRegistry.register(Greet)
    first = BatchService(get_settings())
    await first.start()
    await first.stop()
    run_id = await start(Greet, whom="later")
    second = BatchService(get_settings())
    await second.start()
    try:
        row = await ended(second, run_id)
        assert (row["result"], row["node"]) == (
            f"hello later of {row['created_at']}",
            second.node.id,
        )
    finally:
        await second.stop()


@pytest.mark.first_start
async def test_without_a_ledger_the_error_says_how_to_make_one() -> None:
    with pytest.raises(
        DatabaseError,
        match=r"no such table: batch_tasks \(a service makes the tables.*DATABASE_URL",
    ):
        await start(Greet)
