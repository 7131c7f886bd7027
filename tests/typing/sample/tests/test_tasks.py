"""Tests of the tasks beside it, with the fixture `batch`."""

from datetime import UTC, date, datetime
from typing import assert_type

import httpx
import pytest
from tasks.items import Names, Needs
from tasks.kinds import ByHand, Decorated
from tasks.others import InChunks, StartsAnother, SyncTask
from tasks.signups import SignupsTask

from batch_system import get_db
from batch_system.testing import Batch, CommittedChunk
from service.application.models import User


async def test_a_day_without_users_has_none(batch: Batch) -> None:
    batch.set_time(datetime(2026, 3, 2, 12, tzinfo=UTC))
    run = await batch.run(SignupsTask, day=date(2026, 3, 1))
    assert assert_type(run.state, str) == "succeeded"
    assert run.result == {"day": "2026-03-01", "count": 0}
    assert assert_type(run.started_at, datetime | None) == batch.now
    assert [line.text for line in run.logs] == []


async def test_a_run_is_tried_again(batch: Batch) -> None:
    batch.fail_next(SignupsTask, OSError("no network"))
    run = await batch.run("signups")
    assert (run.attempt, run.reason) == (2, None)
    assert run.error is not None and assert_type(run.error["message"], str) == "no network"


async def test_what_is_due_fires(batch: Batch) -> None:
    batch.only(SyncTask)
    runs = await batch.advance(hours=1)
    assert [run.task for run in runs] == ["sync", "signups"]
    assert [(missed.task, missed.count) for missed in batch.missed(SyncTask)] == []


async def test_one_task_starts_another(batch: Batch) -> None:
    await batch.run(StartsAnother, day="2026-03-01")
    assert {run.key for run in batch.runs(SignupsTask)} == {"signups-2026-03-01", None}


async def test_parameters_and_results(batch: Batch) -> None:
    assert (await batch.run(ByHand, words=["a"], often=2)).result == ["a", "a"]
    assert (await batch.run(Decorated)).result == 1


async def test_items_have_a_client_and_parameters(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with get_db() as db:
        db.add(User(email="A@example.com", created_at=datetime(2025, 1, 1, tzinfo=UTC)))
        await db.commit()
    answers = httpx.MockTransport(lambda request: httpx.Response(200, text=str(request.url)))
    monkeypatch.setattr(Names, "transport", answers)
    assert (await batch.run(Names, country="FR")).result == {"done": 1, "set_aside": 0}
    async with get_db(readonly=True) as db:
        assert (await db.get_one(User, 1)).email == "https://fr.example.com/1"
    assert (await batch.run(Needs, first=1)).result == {"done": 1, "set_aside": 0}
    assert [item.item for item in await batch.quarantine(Needs)] == []


async def test_a_crash_repeats_nothing(batch: Batch) -> None:
    killed = await batch.run(InChunks, kill_after_chunk=1)
    assert assert_type(killed.chunks, list[CommittedChunk]) == [CommittedChunk("1", 1, [0, 1])]
    await batch.resume(kill_after_chunk=1)
    run = await batch.resume()
    assert (run.result, [assert_type(chunk.number, int) for chunk in run.chunks]) == (5, [1, 2, 3])
