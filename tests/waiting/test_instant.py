"""A run that was started for a later instant."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from batch_system import clock, start
from batch_system.batch.ledger.states import RunState
from batch_system.batch.queue.cancel import request_cancel
from batch_system.errors import InvalidParameters
from tests.batch.ledger_world import make_task, rows
from tests.waiting.world import MINUTE, START, Waits


async def test_it_waits_until_its_instant_and_is_then_queued(waits: Waits) -> None:
    mail = make_task("mail", None)
    await waits.know(mail)
    run = await start(mail.cls, at=START + 3 * MINUTE)
    assert await waits.state("mail") == "waiting"
    assert await waits.look() == 0
    clock.advance(3 * MINUTE)
    assert await waits.look() == 1
    row = await waits.run_of("mail")
    assert (row["id"], row["state"], row["due_at"], row["slot"]) == (
        run,
        "queued",
        START + 3 * MINUTE,
        None,
    )


@pytest.mark.parametrize("delay", [60, 60.0, timedelta(minutes=1)])
async def test_a_delay_counts_from_the_clock_of_the_ledger(waits: Waits, delay: Any) -> None:
    mail = make_task("mail", None)
    await waits.know(mail)
    await start(mail.cls, delay=delay)
    assert (await waits.run_of("mail"))["due_at"] == START + MINUTE


@pytest.mark.parametrize("given", [{"at": START}, {"at": START - MINUTE}, {"delay": 0}])
async def test_an_instant_in_the_past_means_at_once(waits: Waits, given: Any) -> None:
    mail = make_task("mail", None)
    await waits.know(mail)
    await start(mail.cls, **given)
    assert await waits.state("mail") == "queued"


async def test_it_can_be_cancelled_while_it_waits(waits: Waits) -> None:
    mail = make_task("mail", None)
    await waits.know(mail)
    run = await start(mail.cls, delay=60)
    async with waits.ledger.engine.begin() as connection:
        assert (
            await request_cancel(connection, run, "cancelled by ann", "ann") == RunState.CANCELLED
        )
    clock.advance(MINUTE)
    assert await waits.look() == 0
    assert await waits.state("mail") == "cancelled"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"at": datetime(2026, 3, 10)},
            "at is datetime.datetime(2026, 3, 10, 0, 0); allowed: an aware datetime",
        ),
        ({"at": START, "delay": 1}, "at and delay were both given; allowed: one of them"),
        ({"delay": -1}, "delay is -1; allowed: seconds from 0 (up to 100 years), or a timedelta"),
        ({"delay": True}, "delay is True; allowed: seconds"),
        ({"delay": "1 h"}, "delay is '1 h'; allowed: seconds"),
        ({"delay": timedelta(days=40_000)}, "allowed: seconds from 0 (up to 100 years)"),
    ],
)
async def test_a_wrong_instant_is_refused(waits: Waits, given: Any, message: str) -> None:
    mail = make_task("mail", None)
    await waits.know(mail)
    with pytest.raises(InvalidParameters) as refused:
        await start(mail.cls, **given)
    assert message in refused.value.message
    assert await rows(waits.ledger) == []


async def test_parameters_with_the_names_of_arguments_of_start_are_given_as_a_dict(
    waits: Waits,
) -> None:
    async def run(self: Any, at: str, delay: int = 0) -> None: ...

    mail = make_task("mail", None, run=run)
    await waits.know(mail)
    with pytest.raises(
        InvalidParameters, match=r"give the parameters of run\(\) as params=\{'at': …\}"
    ):
        await start(mail.cls, at=START + MINUTE)
    await start(mail.cls, params={"at": "noon"}, at=START + MINUTE)
    row = await waits.run_of("mail")
    assert (row["params"], row["state"], row["due_at"]) == (
        {"at": "noon"},
        "waiting",
        START + MINUTE,
    )
    with pytest.raises(InvalidParameters, match="params has to be a dict with all parameters"):
        await start(mail.cls, params={"at": "noon"}, other=1)


async def test_a_run_of_tomorrow_may_not_start_yet(waits: Waits) -> None:
    mail = make_task("mail", None, overlap="skip")
    await waits.know(mail)
    await start(mail.cls, at=START + timedelta(days=1))
    now = await start(mail.cls)
    await waits.start(now)
    assert [row["state"] for row in await rows(waits.ledger)] == ["waiting", "running"]
