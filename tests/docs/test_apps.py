"""The service in the application of somebody else: the code of docs/apps.md, its routes, and whose
logging is used.
"""

from __future__ import annotations

import gc
import importlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from batch_system import config, logs, start
from batch_system.app import create_app, lifespan
from batch_system.batch.context.attempt_state import LogBuffer
from batch_system.errors import InvalidSetting
from batch_system.web.api import routes
from tests.batch.ledger_world import rows, until
from tests.docs.test_docs import Block, blocks, read
from tests.processes import START_SECONDS, Service, environment, process
from tests.server.test_serve import ledger_in

MANUAL = """
from batch_system import BaseTask

class Manual(BaseTask):
    name, schedule = "manual", None
    async def run(self): pass
"""

# The applications of the page, in processes of their own.

PAGE = read("docs/apps.md")


def shown(language: str) -> list[Block]:
    return blocks(PAGE, language)


def commands() -> list[str]:
    lines = [line for block in shown("console") for line in block.code.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ uvicorn")]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A folder with every file that the page shows. The task comes every second, so that no test
    waits a minute.
    """
    for block in (*shown("python"), *shown("ini")):
        assert block.file is not None, block.code
        (tmp_path / block.file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / block.file).write_text(block.code.replace('"* * * * *"', '"* * * * * *"'))
    for package in ("myapp", "myapp/tasks"):
        (tmp_path / package / "__init__.py").touch()
    return tmp_path


def wait_for(running: Service, path: str) -> httpx.Response:
    give_up_at = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up_at:
        assert running.process.poll() is None, running.stderr
        if told := re.search(r"http://127\.0\.0\.1:\d+", running.stderr):
            running.url = told[0]
            return running.get(path)
        time.sleep(0.02)
    raise AssertionError(running.stderr)


def test_the_page_has_both_applications() -> None:
    assert commands() == ["uvicorn application:app", "uvicorn myapp.main:app"]


@pytest.mark.parametrize("command", commands())
async def test_an_application_of_the_page_answers_fires_and_drains(
    page: Path, command: str
) -> None:
    words = [sys.executable, "-W", "error", "-m", *command.split(), "--port", "0"]
    with process(page, words) as running:
        assert wait_for(running, "/batch/readyz").json() == {"status": "ready"}
        assert "Hello" in running.get("/").text
        jobs = {job["id"]: job for job in running.get("/batch/scheduler/jobs").json()}
        assert jobs.keys() == {"customers", "greeting"}
        assert jobs["customers"]["name"] == "Greet a customer every minute."
        if "myapp" in command:
            own = {job["id"]: job for job in running.get("/scheduler/jobs").json()}
            assert list(own["customers"]) == ["id", "name", "next_run_time", "trigger"]
            assert own["customers"]["trigger"] == jobs["customers"]["trigger"]
        async with ledger_in(page) as ledger:
            (run, *_) = await until(lambda: rows(ledger, task="customers", state="succeeded"), 20)
            assert run["result"] == "customer"
            running.stop(signal.SIGTERM)
            assert await rows(ledger, state="running") == []
        assert "Traceback" not in running.stderr


async def test_the_smallest_fastapi_application_fires_and_shows_the_pages(page: Path) -> None:
    [smallest] = [block for block in blocks(read("docs/fastapi.md")) if block.file == "smallest.py"]
    (page / "smallest.py").write_text(smallest.code)
    words = [sys.executable, "-W", "error", "-m", "uvicorn", "smallest:app", "--port", "0"]
    with process(page, words) as running:
        assert wait_for(running, "/batch/readyz").json() == {"status": "ready"}
        assert "Sign in" in httpx.get(f"{running.url}/batch/", follow_redirects=True).text
        async with ledger_in(page) as ledger:
            assert await until(lambda: rows(ledger, task="customers", state="succeeded"), 20)
            running.stop(signal.SIGTERM)


@pytest.fixture
def package(page: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package `myapp` of the page can be imported. It is forgotten after the test: others have
    one of that name.
    """
    monkeypatch.syspath_prepend(page)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "myapp"]:
        del sys.modules[name]


async def test_a_task_of_the_page_reads_the_state_that_its_application_has_set(
    page: Path, package: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASKS_DIR", "myapp/tasks")
    application = importlib.import_module("myapp.main").app
    async with started(application), ledger_in(page) as ledger:
        await start(importlib.import_module("myapp.tasks.greeting").GreetingTask)
        [run] = await until(lambda: rows(ledger, task="greeting", state="succeeded"), 20)
    assert run["result"] == "Hello"


# The routes.


@asynccontextmanager
async def started(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    config.forget_settings()
    async with app.router.lifespan_context(app), answering(app) as client:
        yield client


@asynccontextmanager
async def answering(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://app"
    ) as client:
        yield client


@pytest.fixture
def manual(tmp_path: Path) -> None:
    (tmp_path / "tasks" / "manual.py").write_text(MANUAL)


async def seed_jobs(request: Request) -> JSONResponse:
    scheduler = request.app.state.scheduler
    return JSONResponse([job.id for job in scheduler.get_jobs()])


@pytest.mark.usefixtures("manual")
@pytest.mark.parametrize(
    ("app", "prefix"),
    [
        (Starlette(routes=[Mount("/batch", create_app())], lifespan=lifespan), "/batch"),
        (
            Starlette(routes=[Mount("/a", routes=[Mount("/b", create_app())])], lifespan=lifespan),
            "/a/b",
        ),
        (Starlette(routes=[Mount("/batch", routes=routes)], lifespan=lifespan), "/batch"),
        (Starlette(routes=[*routes, Route("/seed", seed_jobs)], lifespan=lifespan), ""),
    ],
    ids=["mounted", "mounted-deeper", "routes-below-a-prefix", "routes-of-its-own"],
)
async def test_the_routes_find_the_service_however_they_got_into_the_application(
    app: Starlette, prefix: str
) -> None:
    async with started(app) as client:
        assert [job["id"] for job in (await client.get(f"{prefix}/scheduler/jobs")).json()] == [
            "manual"
        ]
        assert (await client.get(f"{prefix}/readyz")).json() == {"status": "ready"}
        assert (await client.get(f"{prefix}/healthz")).status_code == 200
        assert (
            await client.get(f"{prefix}/metrics")
        ).status_code == 401  # as `app`, a name that may be an attacker's
        assert (
            "batch_running"
            in (await client.get(f"{prefix}/metrics", headers={"Host": "localhost"})).text
        )
        if not prefix:
            assert (await client.get("/seed")).json() == ["manual"]


@pytest.mark.usefixtures("manual")
async def test_routes_can_be_added_to_a_fastapi_application() -> None:
    app = FastAPI(lifespan=lifespan)
    app.router.routes.extend(routes)
    async with started(app) as client:
        assert [job["id"] for job in (await client.get("/scheduler/jobs")).json()] == ["manual"]


@pytest.mark.parametrize(
    "routing", [[Mount("/batch", create_app())], [Mount("/batch", routes=routes)]]
)
async def test_where_nobody_started_the_service_it_is_not_ready_and_says_what_to_do(
    routing: list[Mount],
) -> None:
    async with answering(Starlette(routes=routing)) as client:
        answer = await client.get("/batch/readyz")
        assert answer.status_code == 503
        assert "must enter batch_system.app.lifespan" in answer.json()["reasons"]["service"]
        assert (await client.get("/batch/healthz")).status_code == 200
        jobs = await client.get("/batch/scheduler/jobs")
        assert jobs.status_code == 503
        assert "must enter batch_system.app.lifespan" in jobs.json()["detail"]


async def test_an_application_does_not_start_without_the_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TASKS_DIR", "nowhere")
    app = Starlette(lifespan=lifespan)
    with pytest.raises(InvalidSetting, match="setting TASKS_DIR"):
        async with started(app):
            raise AssertionError("it started")
    assert vars(app.state)["_state"] == {}


async def test_the_service_stops_when_the_application_fails_after_its_start() -> None:
    app = Starlette()
    with pytest.raises(ZeroDivisionError):
        async with lifespan(app):
            raise ZeroDivisionError
    assert app.state.batch.is_stopping and not app.state.scheduler.running


async def test_the_application_keeps_its_own_settings_of_garbage_collection() -> None:
    threshold, frozen = gc.get_threshold(), gc.get_freeze_count()
    async with started(Starlette(lifespan=lifespan)):
        assert gc.get_threshold() == threshold
        assert gc.get_freeze_count() <= frozen  # what was frozen before may have been freed since


# The logging.

TALKS = """
import logging
import structlog
from batch_system import BaseTask, get_logger

logger = get_logger(__name__)

class Talks(BaseTask):
    name, schedule = "talks", "* * * * * *"
    async def run(self):
        logger.debug("below LOG_LEVEL")
        logger.info("below their level", n=1)
        logger.warning("100% of them", count=3)
        logging.getLogger("library").info("below their level too")
        logging.getLogger("library").warning("%d of them", 5)
        logging.getLogger("apart").info("does not propagate")
        structlog.get_logger("own").warning("by their structlog", n=2)
        try:
            1 / 0
        except ZeroDivisionError:
            logger.error("It failed", exc_info=True)
"""

CONFIGURED = """
import logging.config, structlog
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
    ],
    logger_factory=structlog.stdlib.LoggerFactory(),
)
logging.config.dictConfig({
    "version": 1,
    "formatters": {"theirs": {"format": "THEIRS %(levelname)s %(name)s %(message)s"}},
    "handlers": {"theirs": {"class": "logging.StreamHandler", "formatter": "theirs"}},
    "root": {"level": "WARNING", "handlers": ["theirs"]},
    "loggers": {"apart": {"level": "INFO", "propagate": False}},
})
"""

PROGRAM = """
import asyncio, json, logging, structlog
from starlette.applications import Starlette
from batch_system.app import lifespan
from batch_system.batch.ledger import run_logs
from tests.batch.ledger_world import rows, until

def state():
    root = logging.getLogger()
    handlers = [repr(handler) for handler in root.handlers]
    names = ("apscheduler", "aiosqlite", "alembic")
    levels = {name: logging.getLogger(name).level for name in names}
    return [root.level, handlers, levels, repr(structlog.get_config())]

async def main():
    app, before = Starlette(), [*state(), repr(logging.getLogRecordFactory())]
    async with lifespan(app):
        during, ledger = state(), app.state.batch.ledger
        (run, *_) = await until(lambda: rows(ledger, task="talks", state="succeeded"), 20)
        async with ledger.engine.connect() as connection:
            kept = await run_logs.tail(connection, run["id"], 1_000)
    after = [*state(), repr(logging.getLogRecordFactory())]
    print(json.dumps({"before": before, "during": during, "after": after, "kept": [
        [line.level, line.logger, line.text] for line in kept
    ]}))

asyncio.run(main())
"""


@pytest.mark.parametrize("theirs", [CONFIGURED, ""], ids=["configured", "not-configured"])
def test_their_logging_stays_and_what_a_run_says_is_in_the_ledger(
    tmp_path: Path, theirs: str
) -> None:
    (tmp_path / "tasks" / "talks.py").write_text(TALKS)
    done = subprocess.run(
        [sys.executable, "-c", theirs + PROGRAM],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["before"][:-1] == told["during"] and told["before"] == told["after"]
    kept = [(level, logger, text.split("\n")[0]) for level, logger, text in told["kept"]]
    assert kept == [
        ("info", "tasks.talks", "below their level n=1"),
        ("warning", "tasks.talks", "100% of them count=3"),
        ("warning", "library", "5 of them"),
        *(
            [("info", "apart", "does not propagate"), ("warning", "own", "by their structlog n=2")]
            if theirs
            else []
        ),
        ("error", "tasks.talks", "It failed"),
    ]
    assert told["kept"][-1][2].endswith("ZeroDivisionError: division by zero")
    prefix = ("THEIRS WARNING tasks.talks ", "THEIRS ERROR tasks.talks ") if theirs else ("", "")
    lines = done.stderr.splitlines()
    assert f"{prefix[0]}100% of them count=3" in lines
    assert lines[lines.index(f"{prefix[1]}It failed") + 1].startswith("Traceback")
    assert "below" not in done.stderr


def test_where_our_logging_was_set_up_nothing_is_kept_twice() -> None:
    logs.set_up(stream=StringIO())
    buffer = LogBuffer({"task": "talks", "run": "run-1"})
    token = logs.run_log.set(buffer)
    try:
        with logs.keep_run_lines():
            logs.get_logger("mine").info("once")
    finally:
        logs.run_log.reset(token)
    assert [line.text for line in buffer.take_lines()] == ["once"]
