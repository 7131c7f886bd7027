"""Errors sent to Sentry: which of them a real listener gets, and that nothing waits for a slow
one.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import sentry_sdk
from sentry_sdk.integrations.logging import LoggingIntegration
from sentry_sdk.scope import global_event_processors

from batch_system import config, logs, sentry
from batch_system.batch.execution.run_here import ManualRun
from batch_system.batch.nodes.roles import BY_HAND, Roles
from batch_system.config import get_settings
from batch_system.errors import InvalidSetting
from batch_system.logs.mode import mode
from batch_system.operations.asking.context import Loaded
from batch_system.operations.operations import open_operations
from batch_system.server.service import BatchService
from batch_system.verbs.runs import ShowRun
from tests.processes import ROOT, SERVE, UVICORN, batch
from tests.processes import service as running_service

TASKS = """
import asyncio
import logging
import time
from batch_system import BaseTask, DomainError, Retry, current_run, get_logger

logger = get_logger(__name__)


def connect(password):
    raise ConnectionError("the door is shut")


class AsyncTask(BaseTask):
    name, schedule, timezone = "async", None, "Asia/Tokyo"

    async def run(self, note: str = ""):
        logger.info(f"stays here, {note}")
        connect("h" + "unter2")


class SyncTask(BaseTask):
    name, schedule = "sync", None

    def run(self, note: str = ""):
        logger.info(f"stays here, {note}")
        connect("h" + "unter2")


class RobustTask(BaseTask):
    name, schedule = "robust", None

    def run(self):
        try:
            raise DomainError("the account is closed")
        except DomainError as e:
            logger.error(f"Domain error in {self.name}: {e.message}", exc_info=e, account=7)


class StdlibTask(BaseTask):
    name, schedule = "stdlib", None

    async def run(self):
        logging.getLogger("library").error("%s of %s failed", 2, 3)


class LogAndRaiseTask(BaseTask):
    name, schedule = "log_and_raise", None

    def run(self):
        try:
            connect("")
        except ConnectionError as e:
            logger.error("It failed", exc_info=e)
            raise


class FlakyTask(BaseTask):
    name, schedule, retry = "flaky", None, Retry(attempts=3, wait=0.01, jitter=0)

    async def run(self, good=3):
        if current_run().attempt < good:
            raise ConnectionError(f"down at {current_run().attempt}")


class SlowTask(BaseTask):
    name, schedule, timeout = "slow", None, 0.05

    async def run(self):
        await asyncio.sleep(60)


class LongTask(BaseTask):
    name, schedule = "long", None

    async def run(self):
        await asyncio.sleep(60)


class GoodTask(BaseTask):
    name, schedule = "good", None

    async def run(self):
        logger.warning("not quite an error")
"""


class Listener:
    """Accepts envelopes like Sentry's server. With `answers=False` it accepts requests and never
    answers them.
    """

    def __init__(self, answers: bool = True) -> None:
        self.events: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
        self._changed = threading.Condition()
        self._let_go = threading.Event()
        if answers:
            self._let_go.set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.dsn = f"http://publickey@127.0.0.1:{self._server.server_port}/42"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def wait_for(self, number: int) -> list[dict[str, Any]]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.events) >= number, timeout=20), (
                self.events
            )
        return self.events

    def event(self) -> dict[str, Any]:
        """The only event."""
        (event,) = self.events
        return event

    def take(self, body: bytes) -> None:
        with self._changed:
            self.bodies.append(body)
            self.events += events_in(body)
            self._changed.notify_all()

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/api/42/envelope/"
                assert self.headers["Content-Encoding"] in ("gzip", None)
                listener.take(gzip.decompress(body) if self.headers["Content-Encoding"] else body)
                if not listener._let_go.is_set():
                    listener._let_go.wait(30)
                    return
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def events_in(envelope: bytes) -> Iterator[dict[str, Any]]:
    """Parse an envelope: a line of JSON, then items, each a line of JSON and a payload of the
    length given there.
    """
    _, _, rest = envelope.partition(b"\n")
    while rest:
        header, _, rest = rest.partition(b"\n")
        described = json.loads(header)
        payload, rest = rest[: described["length"]], rest[described["length"] :].removeprefix(b"\n")
        # The latter: how many were dropped.
        assert described["type"] in ("event", "client_report"), described
        if described["type"] == "event":
            yield json.loads(payload)


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    with set_up_listener(monkeypatch) as made:
        yield made


@contextmanager
def set_up_listener(monkeypatch: pytest.MonkeyPatch, answers: bool = True) -> Iterator[Listener]:
    with Listener(answers) as made:
        monkeypatch.setenv("SENTRY_DSN", made.dsn)
        yield made


@pytest.fixture(autouse=True)
def nothing_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("SENTRY_RELEASE", "SENTRY_ENVIRONMENT", "SENTRY_SPOTLIGHT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "tasks/all.py").write_text(TASKS)
    # A service of another test has tagged events too, since this module has imported the SDK.
    before = [
        processor for processor in global_event_processors if processor is not sentry._with_run
    ]
    forget_processors(before)
    yield
    assert not sentry_sdk.is_initialized()
    forget_processors(before)


def forget_processors(but: list[Any]) -> None:
    global_event_processors[:] = but
    sentry._tag_events.cache_clear()


@asynccontextmanager
async def started(roles: Roles | None = BY_HAND) -> AsyncIterator[BatchService]:
    service = BatchService(get_settings(), roles)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


async def run(name: str, slot: datetime | None = None, **params: Any) -> dict[str, Any]:
    """The row of one finished run of a service in this process."""
    async with started() as service:
        manual = ManualRun(service.ledger, service.engine, service.tasks[name], service.node.id)
        return await manual.execute(params, slot, None)


def error_of(event: dict[str, Any]) -> tuple[str, str]:
    last = event["exception"]["values"][-1]
    return last["type"], last["value"]


def functions_of(event: dict[str, Any]) -> list[str]:
    return [frame["function"] for frame in event["exception"]["values"][-1]["stacktrace"]["frames"]]


# What arrives.


@pytest.mark.parametrize("name", ["async", "sync"])
async def test_a_failed_attempt_is_one_event_with_its_run_as_tags(
    listener: Listener, name: str
) -> None:
    row = await run(name, slot=datetime(2026, 11, 25, 2, 30, tzinfo=UTC))
    event = listener.event()
    assert event["tags"] == {
        "task": name,
        "run": row["id"],
        "slot": "2026-11-25T02:30:00Z",
        "attempt": "1",
    }
    assert error_of(event) == ("ConnectionError", "the door is shut")
    assert functions_of(event)[-2:] == ["run", "connect"]
    assert (event["level"], event["logger"]) == ("error", "batch_system.batch")
    assert event["logentry"]["message"] == f"{name} failed: ConnectionError: the door is shut"


SECRETIVE = """
from sqlalchemy import text
from batch_system import BaseTask, get_db, get_logger

SECRET = "topsecret" + "value"

class SecretiveTask(BaseTask):
    name, schedule = "secretive", None

    async def run(self):
        async with get_db() as db:
            try:
                await db.execute(text("SELECT * FROM nowhere WHERE a = :a"), {"a": SECRET})
            except Exception as error:
                get_logger("secretive").error(f"it failed: {error}", exc_info=error)
        async with get_db() as db:
            for _ in range(2):
                statement = text("INSERT INTO users (email) VALUES (:email)")
                await db.execute(statement, {"email": SECRET})
"""


@pytest.mark.parametrize("shows", ["0", "1"])
async def test_the_parameters_of_a_statement_are_shown_only_if_the_setting_says_so(
    tmp_path: Path,
    listener: Listener,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    shows: str,
) -> None:
    (tmp_path / "tasks/secretive.py").write_text(SECRETIVE)
    monkeypatch.setenv("BATCH_SHOW_SQL_PARAMETERS", shows)
    monkeypatch.setenv("DATABASE_URL", database_url)
    written = StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    logs.set_up()
    row = await run("secretive")
    logs.flush()
    async with open_operations(get_settings(), Loaded) as operations:
        shown = await operations(ShowRun(run=row["id"]))
    logs.set_up(stream=written)
    everywhere = {
        "stderr": written.getvalue(),
        "the ledger": repr(row),
        "batch show": repr(shown.model_dump()),
        "Sentry": b"".join(listener.bodies).decode(),
    }
    assert (row["state"], len(shown.attempts), len(listener.events)) == ("failed", 1, 2)
    assert all(
        "INSERT INTO users" in text
        for text in everywhere.values()
        if text is not everywhere["the ledger"]
    )
    found = {where for where, text in everywhere.items() if "topsecretvalue" in text}
    assert found == (set() if shows == "0" else found | {"stderr", "batch show", "Sentry"})


@pytest.mark.parametrize("where", ["a service of its own", "an application with its own logging"])
async def test_an_error_that_a_task_swallows_and_logs_arrives(
    tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "a service of its own":
        assert (
            batch(tmp_path, "run", "robust", settings={"SENTRY_DSN": listener.dsn}).returncode == 0
        )
    else:
        monkeypatch.setattr(mode, "is_set_up", False)
        assert (await run("robust"))["state"] == "succeeded"
    event = listener.event()
    assert error_of(event) == ("DomainError", "the account is closed")
    assert functions_of(event) == ["run"]
    assert event["logentry"]["message"] == "Domain error in robust: the account is closed account=7"
    assert (event["tags"]["task"], event["tags"]["attempt"]) == ("robust", "1")
    assert event.get("extra", {}) == {} and "modules" not in event


async def test_an_error_that_a_library_logs_arrives_with_the_run(listener: Listener) -> None:
    row = await run("stdlib")
    event = listener.event()
    assert (event["logentry"]["formatted"], event["logger"]) == ("2 of 3 failed", "library")
    assert event["tags"]["run"] == row["id"]


async def test_an_error_that_is_logged_and_raised_again_is_one_event(listener: Listener) -> None:
    await run("log_and_raise")
    assert listener.event()["logentry"]["message"] == "It failed"


async def test_each_failed_attempt_is_an_event_and_only_the_last_is_an_error(
    listener: Listener,
) -> None:
    row = await run("flaky", good=4)
    assert row["state"] == "failed"
    found = [(e["tags"]["attempt"], e["level"], error_of(e)[1]) for e in listener.events]
    assert found == [
        ("1", "warning", "down at 1"),
        ("2", "warning", "down at 2"),
        ("3", "error", "down at 3"),
    ]
    assert {event["tags"]["run"] for event in listener.events} == {row["id"]}


async def test_the_failed_attempts_of_a_run_that_succeeds_are_warnings(listener: Listener) -> None:
    assert (await run("flaky"))["state"] == "succeeded"
    assert [event["level"] for event in listener.events] == ["warning", "warning"]


async def test_a_timeout_is_an_event_and_groups_by_task(listener: Listener) -> None:
    await run("slow")
    event = listener.event()
    assert error_of(event) == ("TimeoutError", "timed out after 0.05 s")
    assert (event["level"], event["fingerprint"]) == ("error", ["{{ default }}", "slow"])


async def test_an_error_of_the_service_itself_has_no_tags(
    listener: Listener, tmp_path: Path
) -> None:
    (tmp_path / "tasks/broken.py").write_text("1 / 0\n")
    async with started(roles=None):
        pass
    event = listener.event()
    assert error_of(event)[0] == "ZeroDivisionError"
    assert "tags" not in event


async def test_release_and_environment_are_the_package_s_unless_they_are_set(
    listener: Listener, tmp_path: Path
) -> None:
    await run("sync")
    (tmp_path / ".env").write_text("SENTRY_RELEASE=mine@7\nSENTRY_ENVIRONMENT=staging\n")
    config.forget_settings()
    await run("sync")
    first, second = ((event["release"], event["environment"]) for event in listener.events)
    assert first[0].startswith("batch-system@") and first[1] == "production"
    assert second == ("mine@7", "staging")


# What does not.


async def test_a_run_that_succeeds_or_is_stopped_is_no_event(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAIN_SECONDS", "0")
    await run("good")
    async with started() as service:
        manual = ManualRun(service.ledger, service.engine, service.tasks["long"], service.node.id)
        await manual._start(None, None, None)
    assert listener.bodies == []


@pytest.mark.parametrize("name", ["async", "sync"])
def test_no_value_of_a_variable_and_no_line_of_the_log_is_sent(
    tmp_path: Path, listener: Listener, name: str
) -> None:
    words = ("run", name, "--param", "note=5ecret")
    done = batch(tmp_path, *words, settings={"SENTRY_DSN": listener.dsn})
    assert "stays here, 5ecret" in done.stderr
    assert error_of(listener.event()) == ("ConnectionError", "the door is shut")
    (body,) = listener.bodies
    assert not [word for word in (b"5ecret", b"hunter2", b'"vars"') if word in body]


async def test_the_thread_that_sends_ends_with_the_service(listener: Listener) -> None:
    await run("sync")
    for thread in threading.enumerate():
        if thread.name.startswith("sentry-sdk"):
            thread.join(5)
            assert not thread.is_alive()


def test_nothing_of_sentry_is_imported_without_the_setting(tmp_path: Path) -> None:
    (tmp_path / "tasks/look.py").write_text(
        "import sys\nfrom service import BaseTask\n"
        "class LookTask(BaseTask):\n    name, schedule = 'look', None\n"
        "    async def run(self):\n        return 'sentry_sdk' in sys.modules\n"
    )
    done = batch(tmp_path, "run", "look")
    assert done.stdout.splitlines()[-1] == "false", done.stderr


# Settings that can't be used.


@pytest.mark.parametrize(
    "dsn",
    [
        "nonsense-5ecret",
        "https://5ecret@host",
        "https://key@host/5ecret",
        "http://key@h:5ecret/1",
        "5ecret://k@h/1",
    ],
)
async def test_an_invalid_dsn_is_refused_without_being_shown(
    monkeypatch: pytest.MonkeyPatch, dsn: str
) -> None:
    monkeypatch.setenv("SENTRY_DSN", dsn)
    with pytest.raises(InvalidSetting) as refused:
        await BatchService(get_settings()).start()
    assert (
        refused.value.message
        == "setting SENTRY_DSN: not a DSN, which looks like https://key@host/1"
    )
    assert "5ecret" not in "".join(traceback.format_exception(refused.value))


def test_a_command_reports_an_invalid_dsn_in_one_line(tmp_path: Path) -> None:
    done = batch(tmp_path, "run", "good", settings={"SENTRY_DSN": "5ecret"})
    assert done.returncode == 2
    assert (
        done.stderr == "batch: setting SENTRY_DSN: not a DSN, which looks like https://key@host/1\n"
    )


def test_without_the_extra_the_setting_is_refused_with_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "without/sentry_sdk").mkdir(parents=True)
    (tmp_path / "without/sentry_sdk/__init__.py").write_text("raise ImportError('not there')")
    path = f"{tmp_path / 'without'}:{ROOT}"
    done = batch(
        tmp_path, "run", "good", settings={"SENTRY_DSN": "http://5ecret@h/1", "PYTHONPATH": path}
    )
    assert done.returncode == 2
    assert done.stderr == (
        "batch: setting SENTRY_DSN: sending errors to Sentry needs the extra `sentry`: "
        "pip install 'batch-system[sentry]'\n"
    )


async def test_reporting_ends_if_the_service_can_not_start(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "sqlite:///:memory:")
    with pytest.raises(InvalidSetting, match="DATABASE_URL"):
        await BatchService(get_settings()).start()
    assert not sentry_sdk.is_initialized()


# In an application that has set up Sentry itself.


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """The listener of an application that has called sentry_sdk.init()."""
    with Listener() as made:
        sentry_sdk.init(
            made.dsn,
            release="theirs@1",
            default_integrations=False,
            integrations=[LoggingIntegration()],
        )
        client = sentry_sdk.get_client()
        yield made
        assert sentry_sdk.get_client() is client and client.is_active()
        client.close(timeout=2)
        sentry_sdk.get_global_scope().set_client(None)


@pytest.mark.parametrize("has_setting", [True, False])
async def test_an_application_s_own_sentry_client_is_used_and_not_changed(
    theirs: Listener, monkeypatch: pytest.MonkeyPatch, has_setting: bool
) -> None:
    with Listener() as ours:
        if has_setting:
            monkeypatch.setenv("SENTRY_DSN", ours.dsn)
        row = await run("sync")
        assert ours.bodies == []
    event = theirs.event()  # sent before the service has ended
    assert (event["release"], event["tags"]["run"]) == ("theirs@1", row["id"])
    assert error_of(event) == ("ConnectionError", "the door is shut")


# In processes.


def test_batch_run_sends_before_it_ends(tmp_path: Path, listener: Listener) -> None:
    done = batch(tmp_path, "run", "sync", settings={"SENTRY_DSN": listener.dsn})
    assert done.returncode == 1
    assert listener.event()["tags"]["task"] == "sync"


def test_the_lines_on_stderr_are_not_changed(tmp_path: Path, listener: Listener) -> None:
    """The SDK adds attributes to the records of the logging module."""
    done = batch(tmp_path, "run", "stdlib", settings={"SENTRY_DSN": listener.dsn})
    (line,) = (line for line in done.stderr.splitlines() if "2 of 3" in line)
    assert re.search(r"\] 2 of 3 failed +\[library\] run=\S+ task=stdlib$", line)


OFTEN = """
from batch_system import BaseTask


class OftenTask(BaseTask):
    name, schedule = "often", "* * * * * *"

    async def run(self):
        raise ValueError("no good")
"""


@pytest.mark.parametrize("command", [SERVE, UVICORN], ids=["serve", "uvicorn"])
def test_a_scheduled_run_of_a_service_is_reported_with_its_slot(
    tmp_path: Path, listener: Listener, command: tuple[str, ...]
) -> None:
    (tmp_path / "tasks/often.py").write_text(OFTEN)
    with running_service(tmp_path, command, {"SENTRY_DSN": listener.dsn}) as service:
        events = listener.wait_for(2)
        service.stop()
    assert {event["tags"]["task"] for event in events} == {"often"}
    slots = [event["tags"]["slot"] for event in events]
    assert len(set(slots)) == len(slots)


def test_a_sentry_server_that_hangs_delays_the_end_by_two_seconds_at_most(tmp_path: Path) -> None:
    (tmp_path / "tasks/often.py").write_text(OFTEN)
    with (
        Listener(answers=False) as hanging,
        running_service(tmp_path, settings={"SENTRY_DSN": hanging.dsn}) as service,
    ):
        hanging.wait_for(1)
        assert 1.5 < service.stop() < 4


async def test_a_sentry_server_that_is_down_delays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("SENTRY_DSN", f"http://publickey@127.0.0.1:{taken.getsockname()[1]}/42")
    took = []
    for _ in range(3):  # the machine may be busy with something else just then
        async with started() as service:
            manual = ManualRun(
                service.ledger, service.engine, service.tasks["sync"], service.node.id
            )
            assert (await manual.execute({}, None, None))["state"] == "failed"
            before = time.monotonic()
        took.append(time.monotonic() - before)
        if took[-1] < 1.5:
            break
    assert min(took) < 1.5


async def test_the_event_loop_goes_on_while_the_last_events_are_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.02)
            ticks += 1

    with set_up_listener(monkeypatch, answers=False):
        async with started() as service:
            manual = ManualRun(
                service.ledger, service.engine, service.tasks["sync"], service.node.id
            )
            await manual.execute({}, None, None)
            ticking = asyncio.create_task(tick())
            before = time.monotonic()
        took = time.monotonic() - before
        ticking.cancel()
    assert 1.9 < took < 5 and ticks > 20, (took, ticks)
