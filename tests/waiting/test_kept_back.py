"""What a failed run keeps back, and what is in the way of a run: asked of chains of tasks."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from batch_system import Start, start_all
from batch_system.batch.ledger import chains
from batch_system.batch.ledger.chains import KeptBack
from batch_system.batch.ledger.states import RunState
from batch_system.batch.queue.retry import retry
from batch_system.batch.tasks.after import After
from batch_system.words import kept_back_in_words
from tests.batch.ledger_world import make_task, rows
from tests.waiting.test_after import THREE, daily, load_after, make_slots
from tests.waiting.world import Waits

HOUR = timedelta(hours=1)


async def kept_by(waits: Waits, task: str, fingerprint: str = "1:boom") -> str:
    async with waits.ledger.reader.connect() as connection:
        found = await chains.kept_back_by_errors(connection, [(task, fingerprint)])
    return kept_back_in_words(found.get((task, fingerprint), []))


async def kept_by_run(waits: Waits, run: str) -> str:
    async with waits.ledger.reader.connect() as connection:
        return kept_back_in_words(await chains.kept_back_by_run(connection, run))


async def fail(waits: Waits, task: str, slot: Any = None) -> str:
    run = await waits.run_of(task, slot)
    await waits.start(run["id"])
    await waits.finish(run["id"], RunState.FAILED, fingerprint="1:boom")
    return str(run["id"])


async def chain_of_three(waits: Waits) -> None:
    """extract each hour, load after it, and report once a day after load."""
    report = make_task("report", "0 3 * * *", after="load")
    await make_slots(waits, daily("extract", "0 * * * *", overlap="allow"), load_after(), report)


async def test_a_failed_run_keeps_back_what_waits_for_it_in_whichever_depth(waits: Waits) -> None:
    await chain_of_three(waits)
    await fail(waits, "extract", THREE)
    assert await kept_by(waits, "extract") == "1 slot of load, 1 of report"
    for _ in range(3):
        await waits.look()
    assert (await waits.state("load", THREE), await waits.state("report")) == ("skipped", "skipped")
    assert await kept_by(waits, "extract") == "1 slot of load, 1 of report"
    await waits.fire(THREE + HOUR)
    await fail(waits, "extract", THREE + HOUR)
    assert await kept_by(waits, "extract") == "2 slots of load, 1 of report"
    assert await kept_by(waits, "extract", "1:other") == ""


async def test_it_keeps_nothing_back_once_a_retry_has_succeeded(waits: Waits) -> None:
    await chain_of_three(waits)
    run = await fail(waits, "extract", THREE)
    await waits.look()
    async with waits.ledger.engine.begin() as connection:
        await retry(connection, run, "ann")
    assert await kept_by_run(waits, run) == "1 slot of load, 1 of report"
    await waits.end("extract", THREE)
    await waits.look()
    assert await waits.state("load", THREE) == "queued"
    assert await kept_by_run(waits, run) == ""


async def test_it_does_not_keep_back_what_any_end_opens(waits: Waits) -> None:
    await make_slots(
        waits, daily("extract"), make_task("load", None, after=After("extract", on="end"))
    )
    assert await kept_by(waits, "extract") == ""
    run = await fail(waits, "extract")
    assert await kept_by_run(waits, run) == ""


async def test_it_does_not_keep_back_what_a_person_has_started(waits: Waits) -> None:
    await make_slots(waits, daily("extract"), load_after())
    run = await fail(waits, "extract")
    await waits.look()
    load = (await waits.run_of("load"))["id"]
    async with waits.ledger.engine.begin() as connection:
        await retry(connection, load, "ann")
    assert await kept_by_run(waits, run) == ""


async def test_a_failed_member_keeps_back_the_follow_up_of_its_group(waits: Waits) -> None:
    mail, report = make_task("mail", None, overlap="allow"), make_task("report", None)
    await waits.know(mail, report)
    await start_all([Start(mail.cls), Start(mail.cls)], then=Start(report.cls))
    first = (await rows(waits.ledger, task="mail"))[0]["id"]
    await waits.start(first)
    await waits.finish(first, RunState.FAILED, fingerprint="1:boom")
    assert await kept_by(waits, "mail") == "1 run of report"


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ([], ""),
        ([KeptBack("load", 2, 0), KeptBack("report", 1, 0)], "2 slots of load, 1 of report"),
        (
            [KeptBack("load", 1, 1), KeptBack("mail", 0, 2)],
            "1 slot of load, 1 run of load, 2 of mail",
        ),
        ([KeptBack("load", 1_000, 0, at_least=True)], "at least 1,000 slots of load"),
        (
            [KeptBack(name, 1, 0) for name in "abcd"],
            "1 slot of a, 1 of b, 1 of c, 1 of 1 more task",
        ),
        (
            [KeptBack(name, 1, 0) for name in "abcde"],
            "1 slot of a, 1 of b, 1 of c, 2 of 2 more tasks",
        ),
    ],
)
def test_it_is_said_in_words(kept: list[KeptBack], words: str) -> None:
    assert kept_back_in_words(kept) == words


async def test_what_is_in_the_way_is_named_by_its_cause(waits: Waits) -> None:
    await chain_of_three(waits)
    report = (await waits.run_of("report"))["id"]
    async with waits.ledger.reader.connect() as connection:
        found = await chains.in_the_way(connection, [report])
    blocker, cause = found[report], chains.root(found, report)
    assert (blocker.task, blocker.state) == ("load", "waiting")
    assert cause is not None and (cause.task, cause.state) == ("extract", "queued")


async def test_one_that_has_failed_is_in_the_way_rather_than_one_that_runs(waits: Waits) -> None:
    await make_slots(waits, daily("extract"), daily("rates"), load_after("extract", "rates"))
    await fail(waits, "rates")
    load = (await waits.run_of("load"))["id"]
    async with waits.ledger.reader.connect() as connection:
        found = await chains.in_the_way(connection, [load])
    assert (found[load].task, found[load].state) == ("rates", "failed")


async def test_for_any_end_only_what_is_not_over_is_in_the_way(waits: Waits) -> None:
    load = make_task("load", "0 3 * * *", after=After("extract", "rates", on="end"))
    await make_slots(waits, daily("extract"), daily("rates"), load)
    await fail(waits, "rates")
    run = (await waits.run_of("load"))["id"]
    async with waits.ledger.reader.connect() as connection:
        found = await chains.in_the_way(connection, [run])
    assert (found[run].task, found[run].state) == ("extract", "queued")
