"""The HTTP endpoints, in this process, with the lifespan that a server would run."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from starlette.applications import Starlette

from batch_system import TaskRegistry, config, start
from batch_system.app import create_app
from batch_system.batch.execution import engine
from batch_system.batch.firing import pauses
from batch_system.config import get_settings
from batch_system.errors import InvalidSetting
from batch_system.operations.asking.context import Loaded
from batch_system.operations.operations import Operations
from batch_system.operations.system import nodes
from batch_system.server import readiness
from batch_system.testing.postgres import OwnServer, find_binaries
from batch_system.verbs.night import ShowStatus
from batch_system.web import api
from tests.batch.ledger_world import make_task, refresh, rows, until

TASKS = '''
from batch_system import BaseTask

class Often(BaseTask):
    """Every second."""
    name, schedule = "often", "* * * * * *"
    async def run(self): pass

class Nightly(BaseTask):
    name = "nightly"
    description = "At night in Tokyo"
    schedule = "0 1 * * *"
    timezone = "Asia/Tokyo"
    async def run(self): pass

class ByHand(BaseTask):
    name, schedule = "by_hand", None
    async def run(self): pass
'''


@pytest.fixture(autouse=True)
def tasks(tmp_path: Path) -> None:
    (tmp_path / "tasks" / "some.py").write_text(TASKS)


@asynccontextmanager
async def running(
    monkeypatch: pytest.MonkeyPatch, url: str | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the started application, `client.app`. `url`: the URL of both databases."""
    if url is not None:
        monkeypatch.setenv("DATABASE_URL", url)
        monkeypatch.setenv(
            "LEDGER_URL", url if url.startswith("postgresql") else "sqlite:///ledger.db"
        )
    config.forget_settings()
    app = create_app()
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client


def app_of(client: httpx.AsyncClient) -> Starlette:
    app = client._transport.app  # type: ignore[attr-defined]
    assert isinstance(app, Starlette)
    return app


async def test_jobs_have_id_name_next_run_time_and_trigger(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = datetime.now(UTC)
    async with running(monkeypatch, database_url) as client:
        answer = await client.get("/scheduler/jobs")
        answered = datetime.now(UTC)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    jobs = {job["id"]: job for job in answer.json()}
    assert all(list(job) == ["id", "name", "next_run_time", "trigger"] for job in jobs.values())
    assert {name: (job["name"], job["trigger"]) for name, job in jobs.items()} == {
        "often": ("Every second.", "cron[* * * * * *] UTC"),
        "nightly": ("At night in Tokyo", "cron[0 1 * * *] Asia/Tokyo"),
        "by_hand": ("by_hand", "manual"),
    }
    assert jobs["by_hand"]["next_run_time"] is None
    assert datetime.fromisoformat(jobs["nightly"]["next_run_time"]).astimezone(UTC).hour == 16
    at = datetime.fromisoformat(jobs["often"]["next_run_time"])
    assert began < at <= answered + timedelta(seconds=1)


async def test_a_paused_task_has_no_next_run_time(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(monkeypatch, database_url) as client:
        batch = app_of(client).state.batch
        async with batch.ledger.engine.begin() as connection:
            await pauses.pause(connection, "nightly", "ann", batch.tasks, batch.node.id)
        await refresh(batch.schedules)
        jobs = {job["id"]: job for job in (await client.get("/scheduler/jobs")).json()}
    assert (jobs["nightly"]["next_run_time"], jobs["nightly"]["trigger"]) == (
        None,
        "cron[0 1 * * *] Asia/Tokyo",
    )
    assert jobs["often"]["next_run_time"] is not None


async def test_the_scheduler_is_in_the_applications_state_and_stops_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running(monkeypatch) as client:
        scheduler = app_of(client).state.scheduler
        assert isinstance(scheduler, AsyncIOScheduler)
        assert scheduler.running
    assert not scheduler.running


async def test_a_started_service_is_healthy_and_ready(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(monkeypatch, database_url) as client:
        healthy, ready = await client.get("/healthz"), await client.get("/readyz")
    assert (healthy.status_code, healthy.json()) == (200, {"status": "ok"})
    assert (ready.status_code, ready.json()) == (200, {"status": "ready"})


@pytest.mark.rest
async def test_a_service_without_a_free_thread_says_so_and_is_ready_and_so_does_the_ledger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    goes_on = threading.Event()

    def run(self: object) -> None:
        goes_on.wait()

    make_task("sync", None, run, overlap="allow")
    monkeypatch.setattr(engine, "CROWDED_SECONDS", 0.1)
    monkeypatch.setattr(readiness, "LOOK_SECONDS", 0.05)
    monkeypatch.setenv("MAX_THREADS", "1")
    monkeypatch.setenv("HEARTBEAT_SECONDS", "0.2")
    async with running(monkeypatch) as client:
        for _ in range(2):
            await start(TaskRegistry.get("sync").cls)

        async def warned() -> object:
            answer = await client.get("/readyz")
            assert answer.status_code == 200
            return answer.json().get("warnings")

        said = (
            r"no thread has been free since .* UTC, and runs are waiting: "
            r"all 1 threads are in use \(MAX_THREADS\)"
        )
        assert isinstance(warnings := await until(warned), dict)
        assert warnings.keys() == {"threads"} and re.fullmatch(said, warnings["threads"])
        ledger = app_of(client).state.batch.ledger
        elsewhere = Operations(ledger, ledger, Loaded, get_settings(), are_ready=True)

        async def told() -> object:
            return (await nodes.living(elsewhere.context))[0].troubles or None

        assert await until(told) == warnings
        status = await elsewhere(ShowStatus())
        assert (status.ok, status.troubles[0].kind) == (False, "readiness")
        assert re.fullmatch(f"Process {os.getpid()} on .*: threads: {said}", status.headline)
        goes_on.set()
        await until(lambda: _none(warned))
        await until(lambda: _none(told))


async def _none(ask: Callable[[], Awaitable[object]]) -> bool:
    return await ask() is None


async def test_a_stopping_service_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch) as client:
        app_of(client).state.batch.stopping.set()
        answer = await client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json() == {"status": "not ready", "reasons": {"service": "it is stopping"}}


async def test_a_service_without_a_free_connection_is_not_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(api, "READY_SECONDS", 0.2)
    async with running(monkeypatch) as client, AsyncExitStack() as held:
        reader = app_of(client).state.batch.application.reader
        for _ in range(reader.pool.size()):
            await held.enter_async_context(reader.connect())
        answer = await asyncio.wait_for(client.get("/readyz"), 5)
    assert answer.status_code == 503
    assert answer.json()["reasons"] == {"databases": "no answer within 0.2 s"}


@pytest.fixture
def own_server() -> Iterator[OwnServer]:
    """A PostgreSQL that this test may stop."""
    with OwnServer(find_binaries(), fast=True) as server:
        assert isinstance(server, OwnServer)
        yield server


@pytest.mark.rest
async def test_without_its_database_a_service_is_healthy_but_not_ready_until_the_database_is_back(
    own_server: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(monkeypatch, await own_server.create_database()) as client:
        batch = app_of(client).state.batch
        assert (await client.get("/readyz")).status_code == 200
        await until(lambda: rows(batch.ledger, task="often", state="succeeded"))

        own_server.stop("immediate")
        away = await client.get("/readyz")
        assert away.status_code == 503
        assert set(away.json()["reasons"]) == {"application", "ledger"}
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/scheduler/jobs")).status_code == 200
        await asyncio.sleep(2)  # the time that is to be made good for

        own_server.start()
        back_at = datetime.now(UTC)

        async def is_ready() -> bool:
            return (await client.get("/readyz")).status_code == 200

        async def fires() -> bool:
            return any(run["slot"] > back_at for run in await rows(batch.ledger, task="often"))

        await until(is_ready, 20)
        await until(fires, 20)
        slots = sorted(run["slot"] for run in await rows(batch.ledger, task="often"))
    assert {late - early for early, late in pairwise(slots)} == {timedelta(seconds=1)}


async def test_an_unknown_path_is_404_and_a_reading_endpoint_refuses_other_methods(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running(monkeypatch) as client:
        assert (await client.get("/nothing")).status_code == 404
        assert (await client.post("/scheduler/jobs")).status_code == 405


async def test_a_server_gets_one_line_on_why_the_service_can_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TASKS_DIR", "jobs")
    config.forget_settings()
    sent = []

    async def receive() -> dict[str, str]:
        return {"type": "lifespan.startup"}

    async def send(message: dict[str, str]) -> None:
        sent.append(message)

    with pytest.raises(InvalidSetting):
        await create_app()({"type": "lifespan", "state": {}}, receive, send)  # type: ignore[arg-type]
    (told,) = sent
    assert told["type"] == "lifespan.startup.failed"
    assert told["message"].startswith("setting TASKS_DIR: ") and "\n" not in told["message"]
