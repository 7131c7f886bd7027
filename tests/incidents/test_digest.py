"""The digest: one message for each slot of BATCH_DIGEST_CRON, even if the ledger fails at that
moment.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from batch_system import clock
from batch_system.batch.ledger import nodes
from batch_system.batch.ledger.incidents.tables import outbox
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.nodes import ledger_poll
from batch_system.config import get_settings
from batch_system.database.engine import Database
from batch_system.operations.asking.context import Loaded
from batch_system.operations.operations import Operations
from batch_system.server.digest import Digest
from tests.batch.ledger_world import know, make_task, rows, until
from tests.incidents.watching import Watching, failed, rename, watching

START = datetime(2026, 3, 10, 6, 59, 30, tzinfo=UTC)


@pytest.fixture
async def watch(ledger: Database) -> AsyncIterator[Watching]:
    with clock.moved(START):
        await know(ledger, make_task("load", None), make_task("payroll", None, tags=("secret",)))
        async with watching(ledger, ledger) as node:
            yield node


@pytest.fixture
def operations(ledger: Database) -> Operations:
    return Operations(ledger, ledger, lambda: Loaded({}, []), get_settings(), are_ready=True)


async def polled(watch: Watching, *digests: Digest) -> None:
    """The node of the watch beats, and each node polls the ledger once."""
    async with watch.ledger.engine.begin() as connection:
        await nodes.beat(connection, watch.node, 0.0)
    async with watch.ledger.reader.connect() as connection:
        changes = await ledger_poll.read(connection, new_id())
    for digest in digests:
        digest.on_changes(changes)


async def digests_in(ledger: Database, number: int) -> list[dict[str, Any]]:
    """The messages of digests in the outbox, once this number is there."""

    async def written() -> list[dict[str, Any]]:
        found = await rows(ledger, outbox, kind="digest")
        return found if len(found) >= number else []

    return list(await until(written))


async def test_two_nodes_that_both_hold_the_duty_write_a_digest_once_for_each_slot_and_channel(
    ledger: Database, operations: Operations, watch: Watching
) -> None:
    digests = [
        Digest(operations, ledger, "0 7 * * *", ["mail", "chat"], lambda: True) for _ in range(2)
    ]
    for digest in digests:
        digest.start()
    await failed(ledger, "load", START)
    await failed(ledger, "payroll", START)
    await watch.turn()
    await polled(watch, *digests)
    assert await rows(ledger, outbox, kind="digest") == []
    for day in (1, 2):
        clock.advance(timedelta(minutes=1))
        await polled(watch, *digests)
        written = await digests_in(ledger, 2 * day)
        clock.advance(timedelta(days=1, minutes=-1))
        await polled(watch, *digests)
    for digest in digests:
        await digest.stop()
    assert sorted(row["channel"] for row in written) == ["chat", "chat", "mail", "mail"]
    text = written[0]["content"]["text"]
    assert "- load: ValueError: boom" in text
    assert "- payroll: what its runs say is not sent, because the task has the tag secret" in text


async def test_a_digest_is_tried_again_if_the_ledger_fails_at_that_moment(
    ledger: Database, operations: Operations, watch: Watching, caplog: pytest.LogCaptureFixture
) -> None:
    async def has_failed() -> bool:
        return "the digest could not be written" in caplog.text

    digest = Digest(operations, ledger, "0 7 * * *", ["mail"], lambda: True)
    digest.start()
    await polled(watch, digest)
    clock.advance(timedelta(minutes=1))
    await rename(ledger, "batch_buckets", "away")
    await polled(watch, digest)
    await until(has_failed)
    await rename(ledger, "away", "batch_buckets")
    for _ in range(2):
        clock.advance(timedelta(minutes=1))
        await polled(watch, digest)
        (written,) = await digests_in(ledger, 1)
    await digest.stop()
    assert written["content"]["title"] == "Nothing needs you."
    (line,) = [
        record
        for record in caplog.records
        if "the digest could not be written" in record.getMessage()
    ]
    assert (line.levelname, line.exc_info) == ("WARNING", None)
