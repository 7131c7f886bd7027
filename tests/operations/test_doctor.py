"""The doctor says of each part that the service needs what is so, and what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from batch_system import clock
from batch_system.batch.ledger import database_time, nodes
from batch_system.batch.ledger.incidents import outbox
from batch_system.batch.ledger.incidents.outbox import Note
from batch_system.batch.ledger.tables import new_id
from batch_system.database.engine import Database
from batch_system.operations.asking.context import Loaded
from batch_system.operations.doctor.results import Check
from batch_system.operations.operations import Operations
from batch_system.settings.settings import Settings
from batch_system.verbs.system import Diagnose
from tests.batch.ledger_world import know, make_task
from tests.commands import Batch, in_this_process


@pytest.fixture
def batch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    yield from in_this_process(capsys, monkeypatch)


async def look(ledger: Database, **settings: object) -> dict[str, Check]:
    """What is found, by part; of several findings about one part the worst."""
    operations = Operations(
        ledger,
        ledger,
        lambda: Loaded({}, []),
        Settings(_env_file=None, **settings),  # type: ignore[arg-type]
        are_ready=True,
    )
    found = await operations(Diagnose())
    assert found.ok == all(check.health != "bad" for check in found.checks)
    order = ["good", "warning", "bad"]
    return {
        check.part: check
        for check in sorted(found.checks, key=lambda check: order.index(check.health))
    }


async def serve(ledger: Database, **values: object) -> None:
    """A service that lives now."""
    row = {"id": new_id(), "host": "here", "pid": os.getpid(), "version": "1", "draining": False}
    async with ledger.engine.begin() as connection:
        now = await database_time.now_of(connection)
        row |= {"started_at": now, "seen_at": now, "tasks": [], "broken": [], "fires": True}
        await nodes.register(connection, row | values)


async def test_it_says_what_is_missing_and_what_to_do(ledger: Database) -> None:
    await know(ledger, make_task("backup", "0 2 * * *"))
    found = await look(ledger)
    assert found["ledger"].health == "good"
    assert (found["services"].health, found["services"].text) == ("bad", "no service runs")
    assert "`batch serve`" in (found["services"].do or "")
    assert found["backups"].text == "there is no verified backup"
    assert (found["channels"].health, found["ping"].health) == ("warning", "warning")


async def test_a_service_with_all_its_parts_is_well(ledger: Database, tmp_path: Path) -> None:
    await serve(ledger, ping={"good_at": clock.now().isoformat()})
    async with ledger.engine.begin() as connection:
        now = await database_time.now_of(connection)
        await outbox.write(connection, [Note("all/1", "test", {"text": "hello"})], now)
        (row,) = await outbox.take(connection, "all/1", now)
        await outbox.sent(connection, [row], now)
    found = await look(
        ledger,
        BATCH_ALERT_URLS=SecretStr("json://example.com"),
        BATCH_PING_URL=SecretStr("https://example.com/ping"),
        BACKUP_DIR=str(tmp_path / "not/there/yet"),
    )
    assert found["services"].text == "1 service and 0 workers live"
    assert found["channels"].text.startswith("1 set; the last message was sent ")
    unwell = {part for part, check in found.items() if check.health != "good"}
    assert unwell <= {"backups", "migrations"}  # tests have neither
    assert "GB are free for the backups" in found["disk"].text


@pytest.mark.parametrize(
    ("pings", "health", "text"),
    [
        (
            [{"good_at": 40}, {"good_at": 100}],
            "good",
            "the last ping was 40 seconds ago, by process 1 on web-0",
        ),
        (
            [{"good_at": 40}, {"good_at": 300, "failed_at": 20, "error": "has answered 503"}],
            "warning",
            "the last ping was 40 seconds ago, by process 1 on web-0; "
            "to process 1 on web-1 the dead man's switch has answered 503",
        ),
        (
            [{"good_at": 181, "failed_at": 1, "error": "does not answer (ConnectTimeout)"}],
            "bad",
            "no ping has succeeded for 3 minutes: "
            "to process 1 on web-0 the dead man's switch does not answer (ConnectTimeout)",
        ),
        (
            [{"failed_at": 1, "error": "has answered 404"}],
            "bad",
            "no ping has succeeded yet: "
            "to process 1 on web-0 the dead man's switch has answered 404",
        ),
        ([{"good_at": 600}], "bad", "no ping has succeeded for 10 minutes"),
        ([{"good_at": "rubbish"}], "bad", "no ping has succeeded yet"),
    ],
)
async def test_it_says_when_the_last_ping_succeeded_and_why_pings_fail(
    ledger: Database, pings: list[dict[str, Any]], health: str, text: str
) -> None:
    with clock.moved(clock.now()):
        for number, ping in enumerate(pings):
            ages = {name: ago for name, ago in ping.items() if isinstance(ago, int)}
            times = {
                name: (clock.now() - timedelta(seconds=ago)).isoformat()
                for name, ago in ages.items()
            }
            await serve(ledger, host=f"web-{number}", pid=1, ping=ping | times)
        found = (await look(ledger))["ping"]  # the setting is that of the services
    assert (found.health, found.text) == (health, text)
    assert (found.do is None) == (health == "good")


async def test_a_ping_of_a_service_that_is_gone_says_nothing_without_the_setting(
    ledger: Database,
) -> None:
    url = SecretStr("https://example.com/ping")
    assert "yet" in (await look(ledger, BATCH_PING_URL=url))["ping"].text
    old = {"good_at": (clock.now() - timedelta(hours=1)).isoformat()}
    await serve(ledger, ping=old, stopped_at=clock.now())
    assert (await look(ledger))["ping"].text.startswith("no dead man's switch is called")
    found = (await look(ledger, BATCH_PING_URL=url))["ping"]
    assert (found.health, found.text) == ("bad", "no ping has succeeded for 60 minutes")


async def test_troubles_lag_broken_files_and_stuck_messages_are_found(ledger: Database) -> None:
    with clock.moved(clock.now()):
        broken = {"source": "tasks/load.py", "error": "SyntaxError: line 3", "task": None}
        await serve(ledger, broken=[broken], loop_lag=2.5, version="0.9")
        await serve(ledger, troubles={"ledger": "no answer within 3 s"})
        async with ledger.engine.begin() as connection:
            now = await database_time.now_of(connection)
            old = now - timedelta(minutes=20)
            await outbox.write(connection, [Note("all/1", "test", {"text": "hello"})], old)
        clock.advance(timedelta(seconds=1))
        found = await look(ledger, BATCH_ALERT_URLS=SecretStr("json://example.com"))
    assert "no answer within 3 s" in found["readiness"].text
    assert found["event loop"].text.endswith("is 2.5 s late")
    assert found["task files"].text == "tasks/load.py on here: SyntaxError: line 3"
    assert found["channels"].text.startswith("1 messages wait for more than ten minutes")
    assert "0.9, 1" in found["versions"].text


def test_the_command_prints_each_part_and_its_exit_code_says_whether_one_is_bad(
    batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    there = f"sqlite+aiosqlite:///{tmp_path}/none.db"
    done = batch("doctor", DATABASE_URL=there)
    assert done.code == 1
    assert "bad      application: there is no database yet" in done.out
    assert "         `batch migrate` makes it" in done.out
    assert "example" not in done.out
