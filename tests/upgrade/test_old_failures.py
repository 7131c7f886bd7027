"""A ledger with many old failures is taken over: nobody is told of them, and the tally of slots is filled backwards."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from service import clock, config
from service.batch.ledger.night import buckets
from service.config import get_settings
from service.server.batch_service import BatchService
from tests.batch.ledger_world import until
from tests.incidents.receivers import HttpReceiver, http_receiver
from tests.upgrade.conftest import State

OLD_FAILURES = 17_000


async def add_old_failures(state: State) -> None:
    """Copies of a run that has failed."""
    engine = create_async_engine(state.urls["LEDGER_URL"], poolclass=NullPool)
    async with engine.begin() as connection:
        row = (await connection.execute(text("SELECT * FROM batch_runs WHERE task = 'broken'"))).mappings().one()
        names = ", ".join(row)
        values = ", ".join(f":{name}" for name in row)
        copies = [{**row, "id": _like(row["id"], number)} for number in range(OLD_FAILURES)]
        await connection.execute(text(f"INSERT INTO batch_runs ({names}) VALUES ({values})"), copies)
    await engine.dispose()


def _like(id: Any, number: int) -> Any:
    """Another id that sorts as this one, of the same type."""
    other = uuid.UUID(bytes=uuid.UUID(str(id)).bytes[:8] + number.to_bytes(8, "big"))
    return other if isinstance(id, uuid.UUID) else str(other)


async def counted(service: BatchService) -> list[Any]:
    """The buckets of the tally that are counted, the oldest first."""
    now = clock.now()
    async with service.ledger.reader.connect() as connection:
        return sorted(await buckets.counted(connection, now - timedelta(days=31), now))


@pytest.fixture
async def receiver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HttpReceiver]:
    async with http_receiver() as receiver:
        monkeypatch.setenv("BATCH_ALERT_WEBHOOK", receiver.url)
        config.forget_settings()
        yield receiver


@pytest.mark.parametrize("name", ["api"])
async def test_nobody_is_told_of_old_failures_and_the_last_days_are_counted_newest_first(
    name: str, state: State, receiver: HttpReceiver
) -> None:
    await add_old_failures(state)
    clock.advance(timedelta(days=3))
    since = clock.now() - timedelta(days=3)
    service = BatchService(get_settings())
    await service.start()
    try:
        first = await service.operations.night(since=since)
        assert first.accounted_from is not None and since < first.accounted_from
        seen: list[int] = []

        async def are_all_counted() -> bool:
            # Of the last ones some may still have a run that goes on.
            there = [bucket for bucket in await counted(service) if bucket < clock.now() - timedelta(minutes=30)]
            newest_first = [there[-1] - number * buckets.LENGTH for number in range(len(there))] if there else []
            assert there == newest_first[::-1]
            seen.append(len(there))
            return len(there) > 400

        await until(are_all_counted, 120)
        assert len(set(seen)) > 5  # in the background, one piece after the other
        night = await service.operations.night(since=since)
        assert (night.accounted_from, night.slots.due, night.slots.unaccounted) == (None, 72, 0)
        failed = {need.task: need.open + need.retrying for need in night.needs if need.kind == "failed"}
        assert failed == {"flaky": 1}  # its last attempt was due meanwhile
        events = [event["incident"] for request in receiver.requests for event in request.json["events"]]
        assert [event["task"] for event in events if event["kind"] in ("failed", "missed", "down")] == ["flaky"]
    finally:
        await service.stop()
