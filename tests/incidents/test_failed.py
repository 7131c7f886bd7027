"""Incidents of failed runs: opened once, continued, made good, acknowledged, told once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from batch_system import clock
from batch_system.batch.ledger.states import RunState
from batch_system.batch.nodes import ledger_poll
from batch_system.database.engine import Database
from tests.batch.ledger_world import know, make_task, rows
from tests.incidents.watching import Watching, failed, retried, succeeded, watching

START = datetime(2026, 3, 10, 2, 0, 0, tzinfo=UTC)
HOUR = 3_600.0


@pytest.fixture
async def watch(ledger: Database) -> AsyncIterator[Watching]:
    with clock.moved(START):
        async with watching(ledger, ledger) as node:
            yield node


async def state_of(watch: Watching, run: str) -> dict[str, Any]:
    (row,) = await rows(watch.ledger, id=run)
    return row


async def test_a_failed_run_opens_one_incident_and_is_told_once(
    ledger: Database, watch: Watching
) -> None:
    run = await failed(ledger, "load", START)
    await watch.turn(3)
    (incident,) = await watch.incidents()
    assert (incident["kind"], incident["task"], incident["fingerprint"]) == (
        "failed",
        "load",
        "1:boom",
    )
    assert (incident["count"], incident["newest_run"], incident["text"]) == (
        1,
        run,
        "ValueError: boom",
    )
    assert await watch.notes() == [("all", "opened", "ValueError: boom")]


async def test_the_same_error_continues_the_incident_and_is_not_told_again(
    ledger: Database, watch: Watching
) -> None:
    await failed(ledger, "load", START)
    await watch.turn()
    watch.later(HOUR)
    second = await failed(ledger, "load", clock.now())
    await watch.turn()
    (incident,) = await watch.incidents()
    assert (incident["count"], incident["newest_run"], incident["last_at"]) == (
        2,
        second,
        clock.now(),
    )
    assert len(await watch.notes()) == 1


async def test_another_error_of_the_task_is_another_incident(
    ledger: Database, watch: Watching
) -> None:
    await failed(ledger, "load", START)
    await failed(ledger, "load", START + timedelta(hours=1), fingerprint="1:other")
    await watch.turn()
    assert sorted(row["fingerprint"] for row in await watch.incidents()) == ["1:boom", "1:other"]


async def test_a_retry_with_success_makes_it_good_and_that_is_told(
    ledger: Database, watch: Watching
) -> None:
    run = await failed(ledger, "load", START)
    await watch.turn()
    watch.later(HOUR)
    await retried(ledger, run, RunState.SUCCEEDED, fingerprint=None)
    await watch.turn(2)
    (incident,) = await watch.incidents()
    assert (incident["closed_at"], incident["closed_why"]) == (clock.now(), "made_good")
    good = await state_of(watch, run)
    assert (good["fingerprint"], good["made_good_by"]) == (None, run)
    assert [kind for _, kind, _ in await watch.notes()] == ["opened", "closed"]


async def test_a_retry_that_fails_goes_on_with_the_incident(
    ledger: Database, watch: Watching
) -> None:
    run = await failed(ledger, "load", START)
    await watch.turn()
    watch.later(HOUR)
    await retried(ledger, run, RunState.FAILED)
    await watch.turn(2)
    (incident,) = await watch.incidents()
    assert (incident["count"], incident["closed_at"]) == (2, None)


async def test_a_later_success_makes_good_where_each_run_does_the_same(
    ledger: Database, watch: Watching
) -> None:
    await know(ledger, make_task("load"))
    first = await failed(ledger, "load", START)
    await watch.turn()
    watch.later(HOUR)
    good = await succeeded(ledger, "load", clock.now())
    await watch.turn(2)
    watch.later(10)
    await watch.turn(2)
    (incident,) = await watch.incidents()
    assert incident["closed_why"] == "made_good"
    assert (await state_of(watch, first))["made_good_by"] == good


async def test_a_later_slot_does_not_make_good_where_a_run_takes_its_slot(
    ledger: Database, watch: Watching
) -> None:
    async def run(self: object, slot: datetime) -> None: ...

    await know(ledger, make_task("load", run=run))
    first = await failed(ledger, "load", START)
    await watch.turn()
    watch.later(HOUR)
    await succeeded(ledger, "load", clock.now())
    watch.later(10)
    await watch.turn(2)
    (incident,) = await watch.incidents()
    assert incident["closed_at"] is None
    by_hand = await succeeded(ledger, "load", START, origin="manual")
    watch.later(10)
    await watch.turn(2)
    (incident,) = await watch.incidents()
    assert incident["closed_why"] == "made_good"
    assert (await state_of(watch, first))["made_good_by"] == by_hand


async def test_a_run_with_other_parameters_does_not_make_good(
    ledger: Database, watch: Watching
) -> None:
    await know(ledger, make_task("invoice", schedule=None))
    await failed(ledger, "invoice", params={"order": 99182})
    await watch.turn()
    watch.later(10)
    await succeeded(ledger, "invoice", params={"order": 1})
    watch.later(10)
    await watch.turn(2)
    assert [row["closed_at"] for row in await watch.incidents()] == [None]
    await succeeded(ledger, "invoice", params={"order": 99182})
    watch.later(10)
    await watch.turn(2)
    assert [row["closed_why"] for row in await watch.incidents()] == ["made_good"]


async def test_a_poll_from_before_the_duty_was_taken_does_not_end_the_watch(
    ledger: Database, watch: Watching
) -> None:
    """It was read before the duty was committed, and arrives afterwards. So it does not show that
    this node has the duty.
    """
    async with ledger.reader.connect() as connection:
        stale = replace(await ledger_poll.read(connection, watch.node), watcher=None)
    watch.watch.on_changes(stale)
    assert not watch.watch.holds
    run = await failed(ledger, "load", START)
    await watch.turn(2)
    assert watch.watch.holds
    assert [row["newest_run"] for row in await watch.incidents()] == [run]
