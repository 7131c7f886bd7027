"""What `why` answers about ten faults of real kinds, and about what is hidden from viewers.

The tasks run for real, with the test kit; the watch opens the incidents.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import delete, select, update

from batch_system import BaseTask, ItemTask, Skip, clock, get_db, get_logger
from batch_system.batch.ledger import tables
from batch_system.batch.ledger.people.access_tables import events
from batch_system.batch.tasks.registry import TaskRegistry
from batch_system.database.engine import Database
from batch_system.errors import UnknownTask
from batch_system.operations.asking.actor import Actor
from batch_system.operations.why.results import Why
from batch_system.operations.why.text import lines_of
from batch_system.server import deploys
from batch_system.settings.reading import get_settings
from batch_system.testing.kit import Batch
from batch_system.testing.records import RunRecord
from batch_system.verbs.run_changes import RetryRun, StartRun
from batch_system.verbs.tasks import PauseTask
from batch_system.verbs.why import WhyIncident, WhyRun, WhyTask
from service.application.models import User
from tests.batch.ledger_world import know, rows
from tests.incidents.receivers import http_receiver
from tests.incidents.watching import Watching, watching

ANN = Actor("ann", source="cli")
MARA = Actor("mara", source="page")
VIEWER = Actor("vera", source="api", role="viewer")
logger = get_logger("tests.why")


def said(answer: Why) -> str:
    """The answer as text, with `ID` in place of each id, and `PORT` in place of each port."""
    lines = "\n".join(lines_of(answer))
    return re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", re.sub(r"\b[0-9a-f]{8}\b", "ID", lines))


async def why(batch: Batch, verb: Any, actor: Actor = ANN) -> Why:
    async with batch._service() as service:
        answer: Why = await service.operations.by(actor)(verb)
        return answer


@pytest.fixture
def batch_database(request: pytest.FixtureRequest) -> str:
    return str(getattr(request, "param", "sqlite"))


@pytest.fixture(autouse=True)
def _quiet_client(caplog: pytest.LogCaptureFixture) -> None:
    """The lines of httpx depend on the level that earlier tests have set."""
    caplog.set_level(logging.WARNING, "httpx")


@pytest.fixture
async def ledger(batch: Batch) -> AsyncIterator[Database]:
    database = Database(get_settings().ledger_url, setting="LEDGER_URL", pooled=False)
    yield database
    await database.dispose()


@pytest.fixture
async def watch(ledger: Database) -> AsyncIterator[Watching]:
    """The watch, which opens incidents about what has failed when its `turn` is called."""
    async with watching(ledger, ledger) as node:
        yield node


async def deployed(
    ledger: Database, run: RunRecord, version: str, at: datetime | None = None, **settings: Any
) -> None:
    """The audit has the start of the process that has executed this run, by default before it was
    made: its version and its settings.
    """
    async with ledger.engine.begin() as connection:
        query = select(tables.attempts.c.node).where(tables.attempts.c.run == run.id)
        newest = query.order_by(tables.attempts.c.started_at.desc()).limit(1)
        node = (await connection.execute(newest)).scalar_one()
        its = get_settings().model_copy(update=settings)
        versions = {"package": "0.1.0", "application": version}
        at = at or run.created_at - timedelta(seconds=1)
        await deploys.record_start(connection, node, its, versions, at)


class Statements(BaseTask):
    """Fetches from a bank, which asks for a token."""

    name, schedule = "bank_statements", None
    url = ""

    async def run(self) -> None:
        logger.info("fetching statements of 31 accounts")
        async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
            answer = await client.get(self.url)
        if answer.status_code == 401:
            logger.error('token rejected: audience "statements-v1" is not allowed')
        answer.raise_for_status()


async def refused(batch: Batch, watch: Watching) -> RunRecord:
    """A run that fails, with a version and a setting that the good run before it did not have."""
    batch.add(Statements)
    await deployed(watch.ledger, await batch.run(Statements), "2.14.0")
    await batch.advance(minutes=15)
    bad = await batch.run(Statements)
    await deployed(watch.ledger, bad, "2.14.1", LOG_LEVEL="DEBUG")
    await watch.turn(2)
    return bad


async def test_a_token_that_was_refused_after_a_deploy(
    batch: Batch, watch: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with http_receiver("200 OK", "401 Unauthorized") as bank:
        monkeypatch.setattr(Statements, "url", bank.url)
        bad = await refused(batch, watch)
        await batch.advance(minutes=15)
        await batch.run(Statements)
        await watch.turn(2)
    expected = """\
run ID of bank_statements, made 2026-01-01 00:15:00Z: failed
  HTTPStatusError: Client error '401 Unauthorized' for url 'http://127.0.0.1:PORT/hook'
  2 runs have failed like this since 2026-01-01 00:15:00Z
  the last good run is ID, 2026-01-01 00:00:00Z
  differs from the last good run:
    version: 2.14.0 -> 2.14.1
    setting LOG_LEVEL: INFO -> DEBUG
    log: 1 line -> 3 lines, 1 new kind
  new in the log: [error] token rejected: audience "statements-v1" is not allowed
next: batch logs ID · batch retry ID"""
    assert said(await why(batch, WhyRun(run=bad.id))) == expected
    of_task = said(await why(batch, WhyTask(name="bank_statements")))
    assert of_task.startswith("bank_statements has been failing since 2026-01-01 00:15:00Z\n")
    assert "setting LOG_LEVEL" in of_task and "batch why ID" in of_task
    answer = await why(batch, WhyRun(run=bad.id))
    assert answer.incident is not None
    room = said(await why(batch, WhyIncident(incident=answer.incident)))
    assert room.startswith("bank_statements failed, 2 times since 2026-01-01 00:15:00Z\n")
    assert room.endswith("next: batch logs ID · batch retry --error ID · batch ack ID --note …")


async def compared(batch: Batch, watch: Watching, task: type[BaseTask], **params: Any) -> str:
    """What is said of a run that fails a minute after one that has succeeded."""
    batch.add(task)
    assert (await batch.run(task)).state == "succeeded"
    await batch.advance(minutes=1)
    run = await batch.run(task, **params)
    assert run.state == "failed"
    await watch.turn(2)
    return said(await why(batch, WhyRun(run=run.id)))


class Export(BaseTask):
    """Writes a file. `/dev/full` is a disk without room."""

    name, schedule = "export", None

    async def run(self, path: str = "/dev/null", api_token: str = "one") -> None:
        logger.info("writing 4,118 rows", path=path)
        await asyncio.to_thread(self.write, path)

    def write(self, path: str) -> None:
        with open(path, "wb", buffering=0) as file:
            file.write(b"row")


@pytest.mark.rest
async def test_a_full_disk(batch: Batch, watch: Watching) -> None:
    text = await compared(batch, watch, Export, path="/dev/full", api_token="two")
    assert (
        text
        == """\
run ID of export, made 2026-01-01 00:01:00Z: failed
  OSError: [Errno 28] No space left on device
  the last good run is ID, 2026-01-01 00:00:00Z
  differs from the last good run:
    parameter api_token: none -> ***
    parameter path: none -> /dev/full
    log: 1 line -> 2 lines, 1 new kind
  new in the log: [info] writing 4,118 rows path='/dev/full'
next: batch logs ID · batch retry ID"""
    )


class Pages(BaseTask):
    """Reads pages from a server that is slow at times."""

    name, schedule, timeout = "pages", None, 0.3

    async def run(self, is_slow: bool = False) -> None:
        logger.info("page 1 took 0 s")
        if is_slow:
            logger.warning("page 40 took 12 s")
            async with http_receiver("hang") as server, httpx.AsyncClient(trust_env=False) as web:
                await web.get(server.url, timeout=60)


@pytest.mark.rest
async def test_a_server_that_is_too_slow(batch: Batch, watch: Watching) -> None:
    text = await compared(batch, watch, Pages, is_slow=True)
    assert "\n  timed out after 0.3 s\n" in text
    assert "\n  new in the log: [warning] page 40 took 12 s\n" in text


class Model(BaseTask):
    """Takes more memory than there is."""

    name, schedule = "model", None

    async def run(self, gigabytes: int = 0) -> None:
        bytearray(gigabytes << 30)


@pytest.mark.rest
async def test_no_memory(batch: Batch, watch: Watching) -> None:
    text = await compared(batch, watch, Model, gigabytes=1 << 30)
    assert text.splitlines()[1:5] == [
        "  MemoryError",
        "  the last good run is ID, 2026-01-01 00:00:00Z",
        "  differs from the last good run:",
        f"    parameter gigabytes: none -> {1 << 30}",
    ]


class Transfers(BaseTask):
    """Two transactions that lock two rows, each in another order."""

    name, schedule = "transfers", None

    async def run(self, at_once: bool = False) -> None:
        async with get_db() as db:
            if not at_once:
                db.add_all([User(id=1, email="one"), User(id=2, email="two")])
                await db.commit()
                return
            async with get_db() as other:
                await self.touch(db, 1)
                await self.touch(other, 2)
                both = (self.touch(db, 2), self.touch(other, 1))
                ends = await asyncio.gather(*both, return_exceptions=True)
                raise next(end for end in ends if isinstance(end, Exception))

    async def touch(self, db: Any, user: int) -> None:
        await db.execute(update(User).where(User.id == user).values(email=f"new {user}"))


@pytest.mark.parametrize("batch_database", ["postgresql"], indirect=True)
@pytest.mark.rest
async def test_a_deadlock(batch: Batch, watch: Watching) -> None:
    text = await compared(batch, watch, Transfers, at_once=True)
    assert "deadlock detected" in text.splitlines()[1]
    assert "parameter at_once: none -> true" in text


class Letters(ItemTask):
    """One letter after the other can't be sent."""

    name, schedule = "letters", None
    size, skip = 1, Skip(limit=1)

    def items(self) -> Any:
        return select(User)

    async def save(self, item: Any, fetched: Any, db: Any) -> None:
        if "@" not in item.email:
            raise ValueError("no address")


@pytest.mark.rest
async def test_items_that_fail_whenever_they_are_tried(batch: Batch, watch: Watching) -> None:
    batch.add(Letters)
    await batch.run(Letters)
    async with get_db() as db:
        db.add_all([User(email=email) for email in ("a@example.com", "nobody", "nowhere")])
        await db.commit()
    await batch.advance(minutes=1)
    run = await batch.run(Letters)
    await watch.turn(2)
    text = said(await why(batch, WhyRun(run=run.id)))
    assert "which is the limit of skip=" in text.splitlines()[1]
    assert "\n  1 item that failed was set aside, and waits in quarantine\n" in text
    assert text.endswith("next: batch quarantine ID · batch redrive ID · batch logs ID")


class Report(BaseTask):
    name, schedule, pool = "report", None, "gpu"

    async def run(self) -> None: ...


@pytest.mark.rest
async def test_a_worker_that_is_missing(batch: Batch, watch: Watching) -> None:
    batch.add(Report)
    async with batch._service() as service:
        run = await service.operations(StartRun(name="report"))
        text = said(await service.operations(WhyRun(run=run.id)))
    assert text == (
        "run ID of report, made 2026-01-01 00:00:00Z: queued\n"
        "  no running process has report loaded\n"
        "next: batch nodes · batch show report"
    )


class Extract(BaseTask):
    name, schedule = "extract", "0 * * * *"

    async def run(self) -> None: ...


class Load(BaseTask):
    name, after = "load", "extract"

    async def run(self) -> None: ...


@pytest.mark.rest
async def test_a_pause_of_the_task_before_it_that_was_forgotten(
    batch: Batch, watch: Watching
) -> None:
    batch.add(Extract, Load)
    await batch.advance(hours=1)
    async with batch._service() as service:
        pause = PauseTask(name="extract", note="the disk is being swapped")
        await service.operations.by(MARA)(pause)
    await batch.advance(hours=26)
    text = said(await why(batch, WhyTask(name="extract")))
    assert text.splitlines()[:2] == [
        "extract is paused",
        "  mara paused extract at 2026-01-01 01:00:00Z: the disk is being swapped; since then 26 "
        "slots did not run",
    ]
    assert "missed" not in text and "batch resume extract" in text
    kept = [run for run in batch.runs("load") if run.state != "succeeded"]
    assert said(await why(batch, WhyRun(run=kept[0].id))) == (
        "run ID of load, slot 2026-01-01 02:00:00Z: skipped\n"
        "  extract was missed: paused by mara\n"
        "next: batch why extract · batch retry ID"
    )


class EverySecondHour(BaseTask):
    name, schedule, timezone = "partner_feed", "0 */2 * * *", "Europe/Berlin"

    async def run(self) -> None: ...


class EveryHour(BaseTask):
    name, schedule, timezone = "partner_feed", "0 * * * *", "Europe/Berlin"

    async def run(self) -> None:
        raise ValueError("the feed of this hour is not there yet")


@pytest.mark.rest
async def test_a_schedule_and_a_clock_that_have_changed(batch: Batch, watch: Watching) -> None:
    batch.set_time(datetime(2026, 3, 28, 22, tzinfo=UTC))
    batch.add(EverySecondHour)
    await batch.advance(hours=2)
    TaskRegistry.remove(["partner_feed"])
    batch.add(EveryHour)
    await batch.advance(hours=3)
    await watch.turn(2)
    run = batch.runs("partner_feed")[-1]
    text = said(await why(batch, WhyRun(run=run.id)))
    assert "\n    schedule: 0 */2 * * * -> 0 * * * *\n" in text
    assert "\n    clock of Europe/Berlin: UTC+01:00 -> UTC+02:00\n" in text
    of_task = said(await why(batch, WhyTask(name="partner_feed")))
    changed = "its schedule was changed: 0 */2 * * * Europe/Berlin -> 0 * * * * Europe/Berlin"
    assert changed in of_task
    assert "the clock of Europe/Berlin went forward by 60 min at 2026-03-29 01:00:00Z" in of_task


class Patient(BaseTask):
    name, schedule, timeout = "patient", None, 10

    async def run(self, fails: bool = False) -> None:
        if fails:
            raise ValueError("no")


@pytest.mark.rest
async def test_a_changed_file_and_policy_are_named_and_recorded_once(
    batch: Batch, ledger: Database, watch: Watching
) -> None:
    batch.add(Patient)
    await batch.run(Patient)
    await batch.run(Patient)
    task = TaskRegistry.get("patient")
    policies = replace(task.policies, timeout=2)
    changed = replace(task, digest="0123456789abcdef", policies=policies)
    await batch.advance(minutes=1)
    for _ in range(2):
        await know(ledger, changed)
    TaskRegistry._tasks["patient"] = changed
    await batch.advance(minutes=1)
    (event,) = await rows(ledger, events, action="task.change")
    assert (event["task"], event["before"]["policies"]) == ("patient", {"timeout": 10})
    assert event["after"] == {"policies": {"timeout": 2}, "file": "0123456789abcdef"}
    run = await batch.run(Patient, fails=True)
    await watch.turn(2)
    text = said(await why(batch, WhyRun(run=run.id)))
    assert "\n    policy timeout: 10 -> 2\n" in text
    assert "content of the task's file: " in text and "-> 0123456789abcdef" in text


class Payroll(BaseTask):
    name, schedule, tags = "payroll", None, ("secret",)

    async def run(self, person: str = "nobody") -> None:
        logger.info(f"paying {person}")
        if person != "nobody":
            raise ValueError(f"no account of {person}")


async def test_a_viewer_sees_nothing_of_a_secret_task(batch: Batch, watch: Watching) -> None:
    text = await compared(batch, watch, Payroll, person="Ada Lovelace")
    assert text.count("Ada Lovelace") == 3  # the error, the parameter, the log
    run = batch.runs("payroll")[-1]
    (incident,) = await watch.incidents(task="payroll")
    for verb in (
        WhyRun(run=run.id),
        WhyTask(name="payroll"),
        WhyIncident(incident=incident["id"]),
    ):
        answer = await why(batch, verb, VIEWER)
        assert "Ada" not in answer.model_dump_json() and "ValueError" not in said(answer)
        assert "2026-01-01 00:01:00Z" in said(answer)
    async with batch._service() as service:
        await service.operations.by(MARA)(PauseTask(name="payroll", note="Ada has moved"))
    for actor, sees in ((ANN, True), (VIEWER, False)):
        text = said(await why(batch, WhyTask(name="payroll"), actor))
        assert "mara paused payroll" in text and ("Ada has moved" in text) == sees


async def test_nothing_is_wrong(batch: Batch) -> None:
    batch.add(Patient, Extract)
    async with batch._service() as service:
        run = await service.operations(StartRun(name="patient"))
        await service.finish(run.id)
        assert said(await service.operations(WhyRun(run=run.id))) == (
            "run ID of patient, made 2026-01-01 00:00:00Z: succeeded\n"
            "  nothing was wrong with it\nnext: batch logs ID"
        )
        with pytest.raises(UnknownTask):
            await service.operations(WhyTask(name="nobody_knows"))


@pytest.mark.parametrize("by", ["its retry", "another run"])
async def test_a_run_that_was_made_good_is_compared_as_it_had_failed_and_with_what_made_it_good(
    batch: Batch, watch: Watching, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    async with http_receiver("200 OK", "401 Unauthorized") as bank:
        monkeypatch.setattr(Statements, "url", bank.url)
        bad = await refused(batch, watch)
        before = said(await why(batch, WhyRun(run=bad.id)))
        bank.answers = ["200 OK"]
        await batch.advance(minutes=5)
        at = clock.now() - timedelta(seconds=1)
        good = await (batch.retry(bad) if by == "its retry" else batch.run(Statements))
        assert good.state == "succeeded"
        await deployed(watch.ledger, good, "2.14.2", at, LOG_LEVEL="INFO")
        await watch.turn(2)
    text = said(await why(batch, WhyRun(run=bad.id)))
    if by == "its retry":
        assert "its attempt 1 failed: HTTPStatusError" in text
        assert "a later one has succeeded" in text
    (incident,) = await watch.incidents(kind="failed")
    answer = await why(batch, WhyIncident(incident=incident["id"]))
    assert answer.comparison is not None and answer.comparison.bad.version == "2.14.1"
    assert "version: 2.14.0 -> 2.14.1" in before and "version: 2.14.0 -> 2.14.1" in said(answer)
    assert "token rejected" in said(answer)
    assert """\
  the run that made the last one good differs from it:
    version: 2.14.1 -> 2.14.2
    setting LOG_LEVEL: DEBUG -> INFO
""" in said(answer)
    mended = answer.mended
    assert mended is not None and (mended.bad.run, mended.good.run) == (bad.id, good.id)
    assert {"parameter", "file", "policy"} <= set(mended.same) and not mended.new_lines


@pytest.mark.rest
async def test_a_failed_run_that_is_retried_says_what_it_waits_for(
    batch: Batch, watch: Watching
) -> None:
    await compared(batch, watch, Model, gigabytes=1 << 30)
    run = batch.runs("model")[-1]
    async with batch._service() as service:
        await service.operations(PauseTask(name="model", note="the machine is too small"))
        await service.operations(RetryRun(run=run.id))
    text = said(await why(batch, WhyRun(run=run.id)))
    assert text.splitlines()[0].endswith(": queued")
    assert "the machine is too small" in text


@pytest.mark.rest
async def test_what_is_not_known_of_both_runs_is_not_called_the_same(
    batch: Batch, watch: Watching
) -> None:
    batch.add(Patient)
    await batch.run(Patient)
    await batch.advance(minutes=1)
    run = await batch.run(Patient, fails=True)
    async with watch.ledger.engine.begin() as connection:
        await connection.execute(delete(tables.nodes))
    await watch.turn(2)
    answer = await why(batch, WhyRun(run=run.id))
    assert answer.comparison is not None
    assert not {"version", "node"} & set(answer.comparison.same)


@pytest.mark.rest
async def test_the_end_of_a_long_log_is_compared(batch: Batch, watch: Watching) -> None:
    batch.add(Long)
    await batch.run(Long)
    await batch.advance(minutes=1)
    run = await batch.run(Long, fails=True)
    await watch.turn(2)
    answer = await why(batch, WhyRun(run=run.id))
    assert answer.comparison is not None
    assert [line.text for line in answer.comparison.new_lines] == ["the disk is full"]


class Long(BaseTask):
    name, schedule = "long", None

    async def run(self, fails: bool = False) -> None:
        for number in range(3_000):
            logger.info(f"row {number} is written")
        if fails:
            logger.error("the disk is full")
            raise OSError("no")
