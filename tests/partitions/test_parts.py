"""Partitioned tasks: a run is split once, its parts run side by side, and join follows when all
have succeeded.
"""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from typing import Any, ClassVar
from uuid import UUID

import pytest

from batch_system import Done, Part, PartitionedTask, Retry, current_run
from batch_system.errors import InvalidTask, WrongState
from batch_system.testing import Batch


class Sums(PartitionedTask):
    """Adds up the numbers of each part, and all sums in the end."""

    name, schedule, parallel = "sums", "0 1 * * *", 2
    splits: ClassVar[int] = 0
    now: ClassVar[int] = 0
    most: ClassVar[int] = 0
    worked: ClassVar[list[int]] = []

    async def split(self, number: int = 4) -> list[Part]:
        type(self).splits += 1
        return [Part(numbers=list(range(n + 1)), day=date(2026, 1, 1)) for n in range(number)]

    async def work(self, part: Part) -> Any:
        assert part["day"] == date(2026, 1, 1)
        self.worked.append(part.number)
        current_run().progress(part.number, 10)
        return sum(part["numbers"])

    async def join(self, parts: list[Done]) -> int:
        assert [done.part for done in parts] == list(range(1, len(parts) + 1))
        assert all(done.params["day"] == date(2026, 1, 1) for done in parts)
        return sum(done.result for done in parts)


@pytest.fixture
def sums(batch: Batch) -> type[Sums]:
    Sums.splits, Sums.worked = 0, []
    batch.add(Sums)
    batch.only(Sums)
    return Sums


@pytest.mark.rest
async def test_a_run_is_split_its_parts_run_and_join_gets_their_results(
    batch: Batch, sums: type[Sums]
) -> None:
    run = await batch.run(Sums)
    assert (run.state, run.result, run.attempt) == ("succeeded", 0 + 1 + 3 + 6, 1)
    parts = batch.parts(run)
    assert [(part.part, part.state, part.result, part.origin) for part in parts] == [
        (1, "succeeded", 0, "part"),
        (2, "succeeded", 1, "part"),
        (3, "succeeded", 3, "part"),
        (4, "succeeded", 6, "part"),
    ]
    assert {(part.task, part.slot, part.parent) for part in parts} == {("sums", None, run.id)}
    assert (run.count, run.total) == (1 + 2 + 3 + 4, 40)
    assert [each.id for each in batch.runs(Sums)] == [run.id]


async def test_a_part_has_the_slot_of_its_run(batch: Batch, sums: type[Sums]) -> None:
    slots = []

    class Slots(Sums):
        name = "slots"

        async def work(self, part: Part) -> None:
            slots.append(current_run().slot)

        async def join(self, parts: list[Done]) -> None:
            slots.append(current_run().slot)

    batch.add(Slots)
    batch.only(Slots)
    [run] = await batch.advance(hours=2)
    assert run.state == "succeeded"
    assert slots == [datetime(2026, 1, 1, 1, tzinfo=UTC)] * 5


async def test_a_run_without_parts_goes_on_to_join(batch: Batch, sums: type[Sums]) -> None:
    run = await batch.run(Sums, number=0)
    assert (run.state, run.result) == ("succeeded", 0)


@pytest.mark.rest
async def test_a_failed_part_fails_the_run_and_a_retry_runs_only_that_part(
    batch: Batch, sums: type[Sums]
) -> None:
    batch.fail_next(Sums, part=2)
    run = await batch.run(Sums)
    assert (run.state, run.reason) == ("failed", "1 of 4 parts failed: 2")
    assert sorted(sums.worked) == [1, 3, 4]
    again = await batch.retry(run)
    assert (again.state, again.result, again.attempt) == ("succeeded", 10, 2)
    assert sums.worked[3:] == [2]
    assert sums.splits == 1


async def test_a_part_is_tried_again_as_its_policy_says(batch: Batch) -> None:
    class Retried(Sums):
        name, retry = "retried", Retry(attempts=2, wait=60)

    batch.add(Retried)
    batch.only(Retried)
    batch.fail_next(Retried, part=3)
    run = await batch.run(Retried)
    assert (run.state, [part.attempt for part in batch.parts(run)]) == ("succeeded", [1, 1, 2, 1])


async def test_a_join_that_fails_is_tried_again_without_the_parts(batch: Batch) -> None:
    class Joins(Sums):
        name, retry = "joins", Retry(attempts=2, wait=60)
        joined: ClassVar[int] = 0

        async def join(self, parts: list[Done]) -> int:
            type(self).joined += 1
            if self.joined == 1:
                raise OSError("no network")
            return self.joined

    Sums.worked, Sums.splits = [], 0
    batch.add(Joins)
    batch.only(Joins)
    run = await batch.run(Joins)
    assert (run.state, run.result, run.attempt, len(Sums.worked)) == ("succeeded", 2, 2, 4)


@pytest.mark.rest
async def test_with_fail_fast_the_first_failure_cancels_the_others(batch: Batch) -> None:
    class Fast(Sums):
        name, fail_fast, parallel = "fast", True, 1

    Sums.worked = []
    batch.add(Fast)
    batch.only(Fast)
    batch.fail_next(Fast, part=1)
    run = await batch.run(Fast, number=20)
    states = [part.state for part in batch.parts(run)]
    assert run.state == "failed"
    assert states[0] == "failed"
    assert "cancelled" in states
    cancelled = states.count("cancelled")
    assert run.reason == f"1 of 20 parts failed: 1; {cancelled} cancelled"
    again = await batch.retry(run)
    assert (again.state, {part.state for part in batch.parts(run)}) == ("succeeded", {"succeeded"})
    assert sorted(Sums.worked) == list(range(1, 21))


async def test_a_kill_after_a_part_loses_no_part_that_has_ended(
    batch: Batch, sums: type[Sums]
) -> None:
    run = await batch.run(Sums, kill_after_part=2)
    assert run.state == "waiting"
    assert [part.state for part in batch.parts(run)].count("succeeded") >= 2
    run = await batch.resume()
    assert (run.state, run.result, sums.splits) == ("succeeded", 10, 1)


async def test_from_the_beginning_it_is_split_anew(batch: Batch, sums: type[Sums]) -> None:
    run = await batch.run(Sums)
    before = {part.id for part in batch.parts(run)}
    again = await batch.retry(run, from_the_beginning=True)
    assert (again.state, sums.splits, len(batch.parts(run))) == ("succeeded", 2, 4)
    assert before.isdisjoint(part.id for part in batch.parts(run))


async def test_a_part_of_an_ended_run_is_retried_with_its_run(
    batch: Batch, sums: type[Sums]
) -> None:
    batch.fail_next(Sums, part=2)
    run = await batch.run(Sums)
    with pytest.raises(WrongState, match=f"part 2 of run {run.id}"):
        await batch.retry(batch.parts(run)[1])


async def test_a_cancel_of_the_run_reaches_its_parts(batch: Batch, sums: type[Sums]) -> None:
    run = await batch.run(Sums, kill_after_part=1)
    await batch.cancel(run)
    assert {part.state for part in batch.parts(run)} <= {"succeeded", "cancelled", "running"}
    assert (await batch.resume()).state == "cancelled"
    assert {part.state for part in batch.parts(run)} <= {"succeeded", "cancelled"}


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (3, "split() of task odd has returned 3; allowed: a list of Part(…)"),
        ([1], "split() of task odd has returned 1 as part 1; allowed: Part(…)"),
        ([Part(a=object())], "split() of task odd has returned a part 1 that can't be stored"),
        (
            [Part()] * 10_001,
            "split() of task odd has returned 10,001 parts; allowed: at most 10,000",
        ),
        (
            [Part(a=json.loads("[" * 65 + "]" * 65))],
            "a part 1 that can't be stored: a: lists and objects may be nested on 64",
        ),
        ([Part(a="x" * 4_000_001)] * 2, "more than 8,000,000 characters together"),
    ],
)
async def test_a_split_that_can_not_be_stored_fails_the_run(
    batch: Batch, returned: Any, reason: str
) -> None:
    class Odd(PartitionedTask):
        name, schedule = "odd", None

        async def split(self) -> Any:
            return returned

        async def work(self, part: Part) -> None: ...

    batch.add(Odd)
    batch.only(Odd)
    run = await batch.run(Odd)
    assert run.state == "failed"
    assert reason in str(run.reason)


def test_values_of_parts_are_as_they_were() -> None:
    given = {
        "id": UUID(int=5),
        "at": datetime(2026, 1, 1, tzinfo=UTC),
        "n": 1,
        "x": None,
        "l": [1, {"date": "a"}],
    }
    part = Part.stored(7, Part(**given).as_json())
    assert (dict(part), part.number) == (given, 7)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"parallel": 0}, "parallel is 0; allowed: an int from 1"),
        ({"fail_fast": "yes"}, "fail_fast is 'yes'; allowed: True or False"),
        ({"run": lambda self: None}, "it has a run\\(\\) of its own"),
        ({"work": lambda self: None}, "work\\(\\) has other parameters; allowed: `async def work"),
        ({"join": lambda self: None}, "join\\(\\) has other parameters"),
    ],
)
def test_a_wrong_declaration_is_refused(
    batch: Batch, attributes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidTask, match=message):
        batch.add(type("Wrong", (Sums,), {"name": "wrong", **attributes}))
