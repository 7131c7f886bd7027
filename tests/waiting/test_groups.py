"""Groups: many runs, and one that follows when all of them are over."""

from __future__ import annotations

from typing import Any

import pytest

from batch_system import Start, clock, start, start_all
from batch_system.batch.ledger import transitions
from batch_system.batch.ledger.states import Rank, RunState
from batch_system.batch.queue.cancel import request_cancel
from batch_system.batch.queue.retry import retry
from batch_system.batch.tasks.registry import Task
from batch_system.errors import InvalidParameters, UnknownTask
from tests.batch.ledger_world import make_task, rows
from tests.waiting.world import Waits


@pytest.fixture
async def tasks(waits: Waits) -> tuple[Task, Task]:
    """A task whose runs are members, and one that follows."""

    async def run(self: Any, to: int = 0) -> None: ...

    mail, report = make_task("mail", None, run=run, overlap="allow"), make_task("report", None)
    await waits.know(mail, report)
    return mail, report


async def group(waits: Waits, tasks: tuple[Task, Task], number: int = 2, **given: Any) -> list[str]:
    """Start a group. Returns the ids of its members."""
    mail, report = tasks
    then = Start(report.cls, **given)
    follow_up = await start_all([Start(mail.cls, to=to) for to in range(number)], then=then)
    return [row["id"] for row in await rows(waits.ledger, awaited_by=follow_up)]


async def start_and_finish(waits: Waits, run: str, state: RunState = RunState.SUCCEEDED) -> None:
    await waits.start(run)
    await waits.finish(run, state)


async def test_the_follow_up_is_queued_when_all_members_have_succeeded(
    waits: Waits, tasks: tuple[Task, Task]
) -> None:
    first, second = await group(waits, tasks)
    assert [row["params"] for row in await rows(waits.ledger, task="mail")] == [
        {"to": 0},
        {"to": 1},
    ]
    await start_and_finish(waits, first)
    assert await waits.look() == 0
    await waits.start(second)
    assert await waits.look() == 0
    await waits.finish(second)
    assert await waits.look() == 1
    assert await waits.state("report") == "queued"


async def test_without_members_the_follow_up_is_queued_at_once(
    waits: Waits, tasks: tuple[Task, Task]
) -> None:
    assert await group(waits, tasks, 0) == []
    assert await waits.state("report") == "queued"


async def test_many_starts_without_a_follow_up_are_one_transaction(
    waits: Waits, tasks: tuple[Task, Task]
) -> None:
    assert await start_all([Start(tasks[0].cls, to=to) for to in range(3)]) is None
    assert [row["state"] for row in await rows(waits.ledger)] == ["queued"] * 3
    assert await start_all([]) is None


@pytest.mark.parametrize("state", [RunState.FAILED, RunState.CANCELLED])
async def test_it_is_skipped_when_members_did_not_succeed_and_none_is_active(
    waits: Waits, tasks: tuple[Task, Task], state: RunState
) -> None:
    first, second, third = await group(waits, tasks, 3)
    await start_and_finish(waits, first, state)
    await start_and_finish(waits, third)
    assert await waits.look() == 0
    await start_and_finish(waits, second, state)
    assert await waits.look() == 1
    row = await waits.run_of("report")
    assert (row["state"], row["reason"]) == ("skipped", f"2 of 3 did not succeed: run {first}")


async def test_a_retry_of_a_member_lets_it_wait_again(
    waits: Waits, tasks: tuple[Task, Task]
) -> None:
    first, second = await group(waits, tasks)
    await start_and_finish(waits, first, RunState.FAILED)
    await start_and_finish(waits, second)
    await waits.look()
    async with waits.ledger.engine.begin() as connection:
        await retry(connection, first, "ann")
    assert await waits.state("report") == "waiting"
    assert await waits.look() == 0
    await start_and_finish(waits, first)
    assert await waits.look() == 1
    assert await waits.state("report") == "queued"


async def test_a_retry_of_the_follow_up_itself_starts_it_without_waiting(
    waits: Waits, tasks: tuple[Task, Task]
) -> None:
    first, second = await group(waits, tasks)
    await start_and_finish(waits, first, RunState.FAILED)
    await start_and_finish(waits, second)
    await waits.look()
    follow_up = (await waits.run_of("report"))["id"]
    async with waits.ledger.engine.begin() as connection:
        await retry(connection, follow_up, "ann")
    assert await waits.state("report") == "queued"
    async with waits.ledger.engine.begin() as connection:
        await retry(connection, first, "ann")
    assert await waits.state("report") == "queued"


async def test_with_on_end_any_end_opens_it(waits: Waits, tasks: tuple[Task, Task]) -> None:
    first, second = await group(waits, tasks, on="end")
    await start_and_finish(waits, first, RunState.FAILED)
    assert await waits.look() == 0
    await start_and_finish(waits, second, RunState.FAILED)
    await waits.look()
    assert await waits.state("report") == "queued"


async def test_a_cancel_of_the_follow_up_cancels_its_members(
    waits: Waits, tasks: tuple[Task, Task]
) -> None:
    first, second, third = await group(waits, tasks, 3)
    await start_and_finish(waits, first)
    await waits.start(second)
    follow_up = (await waits.run_of("report"))["id"]
    async with waits.ledger.engine.begin() as connection:
        await request_cancel(connection, follow_up, "cancelled by ann", "ann")
    states = {row["id"]: (row["state"], row["cancel_by"]) for row in await rows(waits.ledger)}
    assert states == {
        follow_up: ("cancelled", "ann"),
        first: ("succeeded", None),
        second: ("running", "ann"),
        third: ("cancelled", "ann"),
    }


async def test_a_known_key_of_the_follow_up_writes_nothing(
    waits: Waits, tasks: tuple[Task, Task]
) -> None:
    mail, report = tasks
    first = await start_all([Start(mail.cls)], then=Start(report.cls), key="newsletter")
    again = await start_all(
        [Start(mail.cls), Start(mail.cls)], then=Start(report.cls), key="newsletter"
    )
    assert again == first
    assert len(await rows(waits.ledger)) == 2


async def test_a_group_is_written_as_a_whole_or_not_at_all(
    waits: Waits, tasks: tuple[Task, Task]
) -> None:
    mail, report = tasks
    gone = make_task("gone", None)
    with pytest.raises(UnknownTask, match="gone: no service has loaded this task"):
        await start_all([Start(mail.cls), Start(gone.cls)], then=Start(report.cls))
    with pytest.raises(InvalidParameters, match="there is no parameter 'whom'"):
        await start_all([Start(mail.cls), Start(mail.cls, whom=1)], then=Start(report.cls))
    assert await rows(waits.ledger) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"starts": ["mail"]}, "'mail' is not a Start; write Start(MailTask, to=…)"),
        ({"starts": [], "key": "k"}, "key is the key of the follow-up, so it needs then=Start(…)"),
    ],
)
async def test_wrong_arguments_are_refused(given: Any, message: str) -> None:
    with pytest.raises(InvalidParameters) as refused:
        await start_all(**given)
    assert message in refused.value.message


async def test_more_than_ten_thousand_members_are_refused(
    waits: Waits, tasks: tuple[Task, Task]
) -> None:
    mail, report = tasks
    with pytest.raises(InvalidParameters, match="10,001 runs; allowed: at most 10,000"):
        await start_all([Start(mail.cls)] * 10_001, then=Start(report.cls))
    with pytest.raises(InvalidParameters, match="on is 'failure'; allowed: 'success' or 'end'"):
        await start_all([], then=Start(report.cls, on="failure"))  # type: ignore[arg-type]


async def test_a_member_may_wait_for_an_instant_and_be_the_follow_up_of_another_group(
    waits: Waits, tasks: tuple[Task, Task]
) -> None:
    """A waiting run is active: a run that waits for it continues to wait."""
    mail, report = tasks
    outer = await start_all([Start(mail.cls, delay=60)], then=Start(report.cls))
    assert await waits.look() == 0
    clock.advance(clock.now() - clock.now())
    assert (await rows(waits.ledger, id=outer))[0]["state"] == "waiting"


async def test_in_group_needs_a_run_that_is_a_member(
    waits: Waits, tasks: tuple[Task, Task]
) -> None:
    with pytest.raises(
        InvalidParameters, match="works only inside a run that is a member of a group"
    ):
        await start(tasks[0].cls, in_group=True)


async def test_a_run_that_is_caught_up_by_a_retry_keeps_its_place_in_the_group(
    waits: Waits, tasks: tuple[Task, Task]
) -> None:
    (only,) = await group(waits, tasks, 1)
    await start_and_finish(waits, only, RunState.FAILED)
    async with waits.ledger.engine.begin() as connection:
        assert await transitions.reopen(connection, [only], Rank.MANUAL, "ann", clock.now()) == {
            only
        }
    assert await waits.look() == 0
    assert await waits.state("report") == "waiting"
