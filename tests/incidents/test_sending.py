"""Messages that really arrive: by an HTTP server and a mail server, which fail, hang and ask to
wait.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from apprise.plugins import pagerduty

from batch_system import clock
from batch_system.alerts import pings as pings_module
from batch_system.alerts import sender as sender_module
from batch_system.alerts import sending
from batch_system.alerts.channels import Channel, Channels
from batch_system.alerts.pings import AT_ONCE, Pings
from batch_system.alerts.sender import Sender
from batch_system.batch.execution import pings
from batch_system.batch.ledger.incidents.tables import outbox
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.config import forget_settings, get_settings
from batch_system.database.engine import Database
from batch_system.errors import InvalidSetting
from batch_system.testing.engine import DrivenEngine
from tests.batch.ledger_world import know, make_task, rows, until
from tests.batch.test_runs import insert, new
from tests.incidents.receivers import HttpReceiver, http_receiver, mailbox
from tests.incidents.watching import Watching, failed, rename, retried, watching

START = datetime(2026, 3, 10, 2, 0, 0, tzinfo=UTC)


@asynccontextmanager
async def sending_to(watch: Watching, **urls: str) -> AsyncIterator[Sender]:
    channels = Channels({name: Channel(name, url) for name, url in urls.items()})
    watch.watch._checks._channels = watch.watch._channels = channels.named
    sender = Sender(
        watch.ledger,
        watch.node,
        channels,
        lambda: watch.watch.holds,
        "whsec_" + base64.b64encode(b"key").decode(),
    )
    watch.watch._on_told = sender.wake
    sender.start()
    yield sender
    await sender.stop()


@pytest.fixture
async def watch(ledger: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watching]:
    monkeypatch.setattr(sender_module, "LOOK_SECONDS", 0.02)
    with clock.moved(START):
        async with watching(ledger, ledger) as node:
            yield node


async def arrived(receiver: HttpReceiver, number: int) -> None:
    async def there() -> bool:
        return len(receiver.requests) >= number

    await until(there)


async def noted(watch: Watching, **values: Any) -> dict[str, Any]:
    """The row of the outbox, once it has these values."""

    async def there() -> dict[str, Any] | None:
        found = await rows(watch.ledger, outbox)
        matching = (
            row for row in found if all(row[name] == value for name, value in values.items())
        )
        return next(matching, None)

    return dict(await until(there))


async def test_a_failure_is_posted_to_the_webhook_with_a_signature(
    ledger: Database, watch: Watching
) -> None:
    async with http_receiver() as receiver, sending_to(watch, webhook=receiver.url):
        run = await failed(ledger, "load", START)
        await watch.turn()
        await arrived(receiver, 1)
        await noted(watch, sent_at=START)
    (request,) = receiver.requests
    signed = f"{request.headers['webhook-id']}.{int(START.timestamp())}.".encode() + request.body
    expected = base64.b64encode(hmac.new(b"key", signed, hashlib.sha256).digest()).decode()
    assert request.headers["webhook-signature"] == f"v1,{expected}"
    (event,) = request.json["events"]
    assert (event["event"], event["incident"]["task"], event["incident"]["run"]) == (
        "opened",
        "load",
        run,
    )


async def test_incidents_that_open_shortly_after_a_message_are_in_one_further_message(
    ledger: Database, watch: Watching
) -> None:
    async with http_receiver() as receiver, sending_to(watch, webhook=receiver.url):
        await failed(ledger, "load", START)
        await watch.turn()
        await arrived(receiver, 1)
        for number in range(5):
            await failed(ledger, f"other{number}", START)
            watch.later(2)
            await watch.turn()
        await asyncio.sleep(0.2)
        assert len(receiver.requests) == 1
        watch.later(20)
        await arrived(receiver, 2)
    assert len(receiver.requests[1].json["events"]) == 5


async def test_a_receiver_that_fails_is_tried_again_with_the_same_id(
    ledger: Database, watch: Watching
) -> None:
    async with (
        http_receiver("500 Oops", "204 OK") as receiver,
        sending_to(watch, webhook=receiver.url),
    ):
        await failed(ledger, "load", START)
        await watch.turn()
        row = await noted(watch, attempts=1)
        assert (row["error"], (row["due_at"] - START).total_seconds()) == ("the answer was 500", 10)
        watch.later(10)
        await noted(watch, attempts=2, sent_at=clock.now())
    first, second = receiver.requests
    assert first.headers["webhook-id"] == second.headers["webhook-id"]


async def test_a_receiver_that_asks_for_a_wait_gets_the_message_after_it(
    ledger: Database, watch: Watching
) -> None:
    busy = "429 Too Many Requests\r\nRetry-After: 120"
    async with http_receiver(busy) as receiver, sending_to(watch, webhook=receiver.url):
        await failed(ledger, "load", START)
        await watch.turn()
        row = await noted(watch, attempts=1)
        assert (row["due_at"] - START).total_seconds() == 120


async def test_a_channel_that_hangs_holds_up_no_other(
    ledger: Database, watch: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "TIMEOUT", 60.0)
    async with (
        mailbox() as box,
        http_receiver("hang") as receiver,
        sending_to(watch, webhook=receiver.url, **{"all/1": box.url}),
    ):
        await failed(ledger, "load", START)
        await watch.turn()
        await arrived(receiver, 1)
        await noted(watch, channel="all/1", sent_at=START)
        row = await noted(watch, channel="webhook")
        assert row["sent_at"] is None
    (mail,) = box.mails
    assert (mail.to, mail.subject) == ("oncall@example.com", "load failed")
    assert "ValueError: boom" in mail.text and "batch retry" in mail.text


async def test_a_channel_whose_answer_comes_byte_by_byte_is_tried_again_later(
    ledger: Database, watch: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "LONGEST_CALL", 0.3)
    async with http_receiver("drip") as receiver, sending_to(watch, webhook=receiver.url):
        await failed(ledger, "load", START)
        await watch.turn()
        row = await noted(watch, attempts=1)
        assert (row["sent_at"], row["error"]) == (None, "no answer (TimeoutError)")


async def test_pagerduty_keeps_an_alert_for_each_incident_and_resolves_it(
    ledger: Database, watch: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with http_receiver("202 Accepted") as receiver:
        monkeypatch.setitem(pagerduty.PAGERDUTY_API_LOOKUP, "us", receiver.url)
        async with sending_to(watch, **{"all/1": "pagerduty://routing-key@api-key"}):
            runs = [await failed(ledger, task, START) for task in ("load", "sync")]
            await watch.turn()
            await arrived(receiver, 2)
            await retried(ledger, runs[0], RunState.SUCCEEDED, fingerprint=None)
            watch.later(30)
            await watch.turn(2)
            await arrived(receiver, 3)
    ids = {row["task"]: row["id"] for row in await watch.incidents()}
    told = [
        (request.json["event_action"], request.json["dedup_key"]) for request in receiver.requests
    ]
    assert sorted(told[:2]) == sorted([("trigger", ids["load"]), ("trigger", ids["sync"])])
    assert told[2] == ("resolve", ids["load"])


@pytest.mark.rest
async def test_incidents_of_an_hour_without_a_channel_arrive_once_when_it_is_back(
    ledger: Database, watch: Watching
) -> None:
    """Meanwhile the other channel gets every message, and at the end no incident is told twice or
    left out.
    """
    async with (
        http_receiver("503 Down") as dead,
        mailbox() as box,
        sending_to(watch, webhook=dead.url, **{"all/1": box.url}) as sender,
    ):
        for number in range(12):
            await failed(ledger, f"load{number}", START)
            watch.later(300)
            await watch.turn()
            sender.wake()
            await noted(
                watch, channel="all/1", sent_at=clock.now(), incident=await newest_incident(watch)
            )
        assert all(row["sent_at"] is None for row in await rows(ledger, outbox, channel="webhook"))
        dead.answers = ["204 No Content"]

        async def all_sent() -> bool:
            # Again and again: a try that was under way has failed, and the next one waits.
            watch.later(60)
            sender.wake()
            return all(row["sent_at"] for row in await rows(ledger, outbox))

        await until(all_sent)
    assert len(box.mails) == 12
    told = [event["incident"]["task"] for event in accepted(dead)]
    assert sorted(told) == sorted(f"load{number}" for number in range(12))


async def newest_incident(watch: Watching) -> str:
    return str(max(await watch.incidents(), key=lambda row: (row["opened_at"], row["id"]))["id"])


def accepted(receiver: HttpReceiver) -> list[dict[str, Any]]:
    """The events of the messages that the receiver has taken: of each message the last try."""
    messages = {
        request.headers["webhook-id"]: request.json["events"] for request in receiver.requests
    }
    return [event for events in messages.values() for event in events]


@pytest.mark.rest
async def test_a_dead_channel_is_given_up_after_a_day(ledger: Database, watch: Watching) -> None:
    async with (
        http_receiver("503 Down") as receiver,
        sending_to(watch, webhook=receiver.url) as sender,
    ):
        await failed(ledger, "load", START)
        await watch.turn()
        for attempts in range(1, 60):
            row = await noted(watch, attempts=attempts)
            if row["given_up_at"] is not None:
                break
            clock.advance(row["due_at"] - clock.now())
            sender.wake()
    assert (row["given_up_at"] - START).total_seconds() < 86_400 + 1
    assert row["error"] == "the answer was 503"


# Dead man's switches and the digest.


async def test_a_run_of_a_task_with_a_ping_is_told_when_it_begins_and_how_it_ends(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(self: object, fails: bool = False) -> None:
        if fails:
            raise ValueError("no")

    async with http_receiver() as receiver:
        task = make_task("load", None, run, ping=receiver.url)
        calls = Pings(None, lambda: True)
        calls.start()
        pings.use(calls.tell)
        engine = DrivenEngine(ledger, {"load": task}, new_id())
        await know(ledger, task)
        await insert(ledger, new("load"), new("load", params={"fails": True}))
        await engine.settle()
        await arrived(receiver, 4)
        pings.use(None)
        await calls.stop()
    assert sorted(request.path for request in receiver.requests) == [
        "/hook",
        "/hook/fail",
        "/hook/start",
        "/hook/start",
    ]


async def test_the_service_is_told_only_while_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pings_module, "EVERY_SECONDS", 0.02)
    is_working = True
    async with http_receiver() as receiver:
        calls = Pings(receiver.url, lambda: is_working)
        calls.start()
        await arrived(receiver, 2)
        is_working = False
        await asyncio.sleep(0.2)
        number = len(receiver.requests)
        await asyncio.sleep(0.2)
        await calls.stop()
    assert len(receiver.requests) == number


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("204 No Content", None),
        ("503 Service Unavailable", "has answered 503"),
        ("nobody listens", "does not answer (ConnectError)"),
    ],
)
async def test_what_its_calls_come_to_is_told_without_the_address(
    monkeypatch: pytest.MonkeyPatch, answer: str, error: str | None
) -> None:
    monkeypatch.setattr(pings_module, "EVERY_SECONDS", 0.02)
    told: list[str | None] = []

    async def is_told() -> bool:
        return len(told) >= 2

    async with http_receiver(answer) as receiver, http_receiver() as of_a_task:
        address = "http://127.0.0.1:1" if answer == "nobody listens" else receiver.url
        calls = Pings(f"{address}/hunter2", lambda: True, told.append)
        calls.start()
        calls.tell(of_a_task.url)
        await until(is_told)
        await arrived(of_a_task, 1)
        await calls.stop()
    assert set(told) == {error}


async def call(*urls: str, last: HttpReceiver) -> None:
    """Call these dead man's switches, and `last` after them, until it is called."""
    calls = Pings(None, lambda: True)
    calls.start()
    for url in (*urls, last.url):
        calls.tell(url)
    await arrived(last, 1)
    await calls.stop()


async def test_an_address_that_hangs_delays_no_other() -> None:
    async with http_receiver("hang") as hanging, http_receiver() as receiver:
        await call(*[hanging.url] * (AT_ONCE - 1), last=receiver)


async def test_addresses_whose_answers_come_byte_by_byte_keep_no_other_from_being_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sending, "LONGEST_CALL", 0.3)
    async with http_receiver("drip") as dripping, http_receiver() as receiver:
        await call(*[dripping.url] * AT_ONCE, last=receiver)


async def test_addresses_that_can_not_be_called_keep_no_other_from_being_called(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with http_receiver() as receiver:
        await call(
            *["http://127.0.0.1:99999/no-port", "https://exa\u200bmple.com/"] * AT_ONCE,
            last=receiver,
        )
    assert caplog.text.count("a dead man's switch does not answer") == 2 * AT_ONCE


async def test_the_service_is_told_once_the_certificates_can_be_read_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def is_logged() -> bool:
        return "dead man's switches can't be called" in caplog.text

    monkeypatch.setattr(pings_module, "EVERY_SECONDS", 0.02)
    monkeypatch.setenv("SSL_CERT_FILE", "missing.pem")
    sending._trusted.cache_clear()
    async with http_receiver() as receiver:
        calls = Pings(receiver.url, lambda: True)
        calls.start()
        await until(is_logged)
        monkeypatch.delenv("SSL_CERT_FILE")
        await arrived(receiver, 1)
        await calls.stop()


async def test_no_line_of_the_log_has_the_address_of_a_webhook(
    ledger: Database, watch: Watching, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with (
        http_receiver() as receiver,
        sending_to(watch, webhook=f"{receiver.url}?token=hunter2"),
    ):
        await failed(ledger, "load", START)
        await watch.turn()
        await noted(watch, sent_at=START)
    assert "HTTP Request" not in caplog.text, "each message and each ping would be a line"
    assert "hunter2" not in caplog.text


async def test_while_the_ledger_fails_a_line_says_so_and_what_waits_is_sent_after_that(
    ledger: Database,
    watch: Watching,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def is_told() -> bool:
        return "messages can't be read from the ledger" in caplog.text

    monkeypatch.setattr(sender_module, "FIRST_WAIT", 0.02)
    async with http_receiver() as receiver, sending_to(watch, webhook=receiver.url) as sender:
        await rename(ledger, "batch_outbox", "away")
        sender.wake()
        await until(is_told)
        await rename(ledger, "away", "batch_outbox")
        await failed(ledger, "load", START)
        await watch.turn()
        await arrived(receiver, 1)
    lines = [record for record in caplog.records if "messages can't be read" in record.getMessage()]
    assert all(record.levelname == "WARNING" and record.exc_info is None for record in lines)


@pytest.mark.parametrize(
    "setting", ["BATCH_ALERT_URLS", "BATCH_ALERT_URL_PAYMENTS", "BATCH_DIGEST_URLS"]
)
def test_without_apprise_the_setting_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setitem(sys.modules, "apprise", None)
    monkeypatch.setenv(setting, "mailto://batch:5ecret@mail.example.com")
    forget_settings()
    with pytest.raises(InvalidSetting) as refused:
        Channels.of(get_settings())
    assert refused.value.message == (
        f"setting {setting}: Apprise, which sends to these addresses, is not installed (it is the "
        "extra `alerts`): pip install 'batch-system[alerts]'"
    )
