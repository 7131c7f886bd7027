"""`kill_after_chunk` and `resume()`, on both databases: what a crash does to a task, and what is
committed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import pytest
from sqlalchemy import Select, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from batch_system import BaseTask, ItemTask, Retry, Skip, current_run, get_db, start
from batch_system.errors import BatchError
from batch_system.testing import Batch, CommittedChunk
from batch_system.testing.kills import FreezableCoroutine, Kill
from batch_system.testing.records import RunRecord
from service.application.models import User

on_sqlite = pytest.mark.parametrize("batch_database", ["sqlite"])
"""Where the kind of database plays no part."""


async def add_users(number: int) -> None:
    async with get_db() as db:
        db.add_all([User(email=f"user{n}@example.com") for n in range(1, number + 1)])
        await db.commit()


async def emails() -> list[str]:
    async with get_db(readonly=True) as db:
        return list(await db.scalars(select(User.email).order_by(User.id)))


def ids(run: RunRecord) -> list[list[int]]:
    """Of the users in each of its chunks."""
    return [[user.id for user in chunk.items] for chunk in run.chunks]


async def try_to_write(email: str) -> None:
    async with get_db() as db:
        db.add(User(email=email))
        await db.commit()


class Marks(BaseTask):
    """Marks each user, and records what it does."""

    name, schedule = "marks", None
    told: ClassVar[list[str]] = []

    async def run(self, mark: str = "seen", size: int = 2) -> str:
        self.told.append("begins")
        try:
            async with asyncio.timeout(30):
                async for chunk in self.chunks(select(User), key=User.id, size=size):
                    async with chunk as (_, users):
                        for user in users:
                            user.email += f" {mark}"
                        self.told.append(f"in {chunk.number}")
                    self.told.append(f"behind {chunk.number}")
        except BaseException:
            self.told.append("an exception")
            raise
        finally:
            self.told.append("finally")
            await try_to_write("from finally")
        return mark


@pytest.fixture(autouse=True)
def nothing_told() -> None:
    Marks.told.clear()


async def test_a_run_dies_with_the_commit_and_continues_after_it(batch: Batch) -> None:
    await add_users(5)
    killed = await batch.run(Marks, mark="done", kill_after_chunk=2)
    assert (killed.state, killed.attempt, killed.reason) == ("running", 1, None)
    assert ids(killed) == [[1, 2], [3, 4]]
    assert Marks.told == ["begins", "in 1", "behind 1", "in 2"]
    assert [email.endswith(" done") for email in await emails()] == [True, True, True, True, False]
    resumed = await batch.resume()
    assert (resumed.id, resumed.state, resumed.attempt, resumed.result) == (
        killed.id,
        "succeeded",
        1,
        "done",
    )
    assert Marks.told[4:] == ["begins", "in 3", "behind 3", "finally"]
    assert [(chunk.loop, chunk.number) for chunk in resumed.chunks] == [
        ("1", 1),
        ("1", 2),
        ("1", 3),
    ]
    assert ids(resumed) == [[1, 2], [3, 4], [5]]
    assert await emails() == [*(f"user{n}@example.com done" for n in range(1, 6)), "from finally"]
    assert batch.runs(Marks) == [resumed] and ids(batch.runs()[0]) == ids(resumed)


@on_sqlite
async def test_the_lost_attempt_is_in_the_log_as_after_a_real_loss(batch: Batch) -> None:
    await add_users(5)
    await batch.run(Marks, kill_after_chunk=1)
    run = await batch.resume()
    assert [line.text for line in run.logs] == [
        "resumes after chunk 1 of loop 'chunks:1': 2 are done"
    ]
    assert (run.count, run.error) == (5, None)


@on_sqlite
async def test_it_may_die_again_and_the_chunks_count_anew(batch: Batch) -> None:
    await add_users(7)
    await batch.run(Marks, size=1, kill_after_chunk=3)
    again = await batch.resume(kill_after_chunk=2)
    assert (again.state, [chunk.number for chunk in again.chunks]) == ("running", [1, 2, 3, 4, 5])
    assert (await batch.resume()).state == "succeeded"
    assert [email.count("seen") for email in await emails()] == [1] * 7 + [0]


@on_sqlite
async def test_after_the_last_chunk_nothing_is_left_to_do(batch: Batch) -> None:
    await add_users(4)
    await batch.run(Marks, kill_after_chunk=2)
    run = await batch.resume()
    assert (run.state, len(run.chunks)) == ("succeeded", 2)


@on_sqlite
async def test_a_run_that_makes_progress_each_time_may_be_lost_more_than_three_times(
    batch: Batch,
) -> None:
    await add_users(11)
    assert (await batch.run(Marks, kill_after_chunk=1)).count == 2
    for number in range(2, 6):
        killed = await batch.resume(kill_after_chunk=1)
        assert (killed.state, killed.count) == ("running", 2 * number)
    run = await batch.resume()
    assert (run.state, len(run.chunks)) == ("succeeded", 6)


@on_sqlite
async def test_a_lost_run_that_may_not_be_repeated_has_failed(batch: Batch) -> None:
    class Once(Marks):
        name, rerun = "once", False

    await add_users(5)
    await batch.run(Once, kill_after_chunk=1)
    run = await batch.resume()
    assert (run.state, run.reason) == ("failed", "the node was lost while it ran")
    assert Once.told.count("begins") == 1


@on_sqlite
async def test_a_loss_takes_no_attempt_and_retries_are_made_as_ever(batch: Batch) -> None:
    class Flaky(BaseTask):
        name, schedule, retry = "flaky", None, Retry(attempts=2, wait=60)
        fails_at: ClassVar = [2, 4]

        async def run(self) -> None:
            async for chunk in self.chunks(range(6), size=1):
                async with chunk:
                    if self.fails_at and chunk.number == self.fails_at[0]:
                        self.fails_at.pop(0)
                        raise ConnectionError("away")

    # Of the first attempt and the second together.
    killed = await batch.run(Flaky, kill_after_chunk=3)
    assert (killed.state, killed.attempt) == ("running", 2)
    run = await batch.resume()
    assert (run.state, run.attempt, run.reason) == ("failed", 2, "ConnectionError: away")
    assert [chunk.items for chunk in run.chunks] == [[0], [1], [2]]


class Greets(ItemTask):
    name, schedule, size, concurrency = "greets", None, 3, 2
    skip = Skip(limit=5, on=ValueError)

    def items(self) -> Select[User]:
        return select(User)

    async def fetch(self, user: User) -> str:
        return f"hello {user.id}"

    async def save(self, user: User, fetched: Any, db: AsyncSession) -> None:
        if user.id == 2:
            raise ValueError("not this one")
        user.email = fetched


async def test_an_item_task_continues_after_its_chunks_too(batch: Batch) -> None:
    await add_users(8)
    killed = await batch.run(Greets, kill_after_chunk=1)
    assert (killed.state, ids(killed)) == ("running", [[1, 2, 3]])
    run = await batch.resume()
    assert (run.state, run.result) == ("succeeded", {"done": 7, "set_aside": 1})
    assert ids(run) == [[1, 2, 3], [4, 5, 6], [7, 8]]
    assert await emails() == ["hello 1", "user2@example.com", *(f"hello {n}" for n in range(3, 9))]


class Listing:
    async def after(self, cursor: Any, size: int) -> tuple[list[int], Any]:
        at = cursor or 0
        return list(range(at, at + 2)), at + 2 if at < 4 else None


async def letters() -> AsyncIterator[str]:
    for letter in "abcd":
        yield letter


@on_sqlite
async def test_the_chunks_of_all_loops_are_counted_together_whatever_their_source(
    batch: Batch,
) -> None:
    class Several(BaseTask):
        name, schedule = "several", None

        async def run(self) -> None:
            for source in (Listing(), letters(), select(User.id, User.email)):
                key: Any = {"key": User.id} if isinstance(source, Select) else {}
                async for chunk in self.chunks(source, size=2, **key):
                    async with chunk:
                        pass

    await add_users(3)
    await batch.run(Several, kill_after_chunk=4)
    await batch.resume(kill_after_chunk=2)
    run = await batch.resume()
    assert run.chunks[:5] == [
        CommittedChunk("1", 1, [0, 1]),
        CommittedChunk("1", 2, [2, 3]),
        CommittedChunk("1", 3, [4, 5]),
        CommittedChunk("2", 1, ["a", "b"]),
        CommittedChunk("2", 2, ["c", "d"]),
    ]
    assert [[row.id for row in chunk.items] for chunk in run.chunks[5:]] == [[1, 2], [3]]
    assert run.state == "succeeded"


class Beside(BaseTask):
    """Two loops at once; one of them is in the middle of a chunk when the other one commits."""

    name, schedule = "beside", None
    told: ClassVar[list[str]] = []
    slow_may_go_on: ClassVar = asyncio.Event()

    async def run(self) -> None:
        self._is_in = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._slow())
            group.create_task(self._fast())

    async def _slow(self) -> None:
        try:
            async for chunk in self.chunks([1], size=1, name="slow"):
                async with chunk:
                    self._is_in.set()
                    await self.slow_may_go_on.wait()
                    self.told.append("slow commits")
        finally:
            self.told.append("slow ends")

    async def _fast(self) -> None:
        await self._is_in.wait()
        async for chunk in self.chunks([2], size=1, name="fast"):
            async with chunk:
                pass
        self.slow_may_go_on.set()  # on SQLite two can't write at once


async def test_code_that_runs_beside_the_loop_stands_still_too(batch: Batch) -> None:
    Beside.told.clear()
    Beside.slow_may_go_on.clear()
    killed = await batch.run(Beside, kill_after_chunk=1)
    Beside.slow_may_go_on.set()
    await asyncio.sleep(0.1)
    assert (killed.chunks, Beside.told) == ([CommittedChunk("fast", 1, [2])], [])
    Beside.slow_may_go_on.clear()
    run = await batch.resume()
    assert [chunk.loop for chunk in run.chunks] == ["fast", "slow"]
    assert Beside.told == ["slow commits", "slow ends"]


# SQLite has one writer, and that was the chunk.
@pytest.mark.parametrize("batch_database", ["postgresql"])
async def test_a_transaction_that_was_open_beside_it_is_rolled_back_and_holds_no_lock(
    batch: Batch,
) -> None:
    class Holding(BaseTask):
        name, schedule = "holding", None
        emails: ClassVar = ["ada@example.com"]

        async def run(self) -> None:
            self._has_written = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                other = group.create_task(self._write())
                await self._has_written.wait()
                async for chunk in self.chunks([1], size=1):
                    async with chunk:
                        pass
                other.cancel()

        async def _write(self) -> None:
            async with get_db() as db:
                db.add_all([User(email=self.emails.pop()) for _ in list(self.emails)])
                await db.flush()
                self._has_written.set()
                await asyncio.sleep(30)

    await batch.run(Holding, kill_after_chunk=1)
    await try_to_write("ada@example.com")
    async with asyncio.timeout(10):
        while await transactions():
            await asyncio.sleep(0.05)  # PostgreSQL takes its time to notice
    assert (await batch.resume()).state == "succeeded"
    assert await emails() == ["ada@example.com"]


# There an open snapshot keeps old rows from being removed.
@pytest.mark.parametrize("batch_database", ["postgresql"])
async def test_a_read_only_transaction_that_was_open_beside_it_is_ended_too(batch: Batch) -> None:
    class Reading(BaseTask):
        name, schedule = "reading", None

        async def run(self) -> None:
            self._has_read = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read())
                await self._has_read.wait()
                async for chunk in self.chunks([1], size=1):
                    async with chunk:
                        pass

        async def _read(self) -> None:
            async with get_db(readonly=True) as db:
                await db.execute(select(User))
                self._has_read.set()
                await asyncio.Event().wait()

    await batch.run(Reading, kill_after_chunk=1)
    async with asyncio.timeout(10):
        while await transactions():
            await asyncio.sleep(0.05)  # PostgreSQL takes its time to notice


async def transactions() -> int:
    """The transactions that anybody else has open in this database."""
    others = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid <> pg_backend_pid() "
        "AND state <> 'idle'"
    )
    async with get_db(readonly=True) as db:
        return int((await db.execute(others)).scalar_one())


class Child(BaseTask):
    name, schedule = "child", None
    has_begun: ClassVar = asyncio.Event()

    async def run(self) -> None:
        async for chunk in self.chunks([1, 2], size=1):
            async with chunk:
                pass
            self.has_begun.set()


class Parent(BaseTask):
    """Its child commits a chunk before it does."""

    name, schedule = "parent", None

    async def run(self) -> None:
        async with self.step("child") as step:
            if not step.is_done:
                step.result = await start(Child)
        await Child.has_begun.wait()
        async for chunk in self.chunks([5, 6, 7], size=1):
            async with chunk:
                pass


@on_sqlite
async def test_chunks_of_other_runs_do_not_count_and_those_runs_continue_too(batch: Batch) -> None:
    batch.add(Child)
    Child.has_begun.clear()
    killed = await batch.run(Parent, kill_after_chunk=3)
    assert (killed.state, len(killed.chunks)) == ("running", 3)
    await batch.resume()
    assert {run.task: run.state for run in batch.runs()} == {
        "parent": "succeeded",
        "child": "succeeded",
    }
    assert [len(run.chunks) for run in batch.runs()] == [3, 2]


@on_sqlite
async def test_a_run_with_fewer_chunks_fails_the_test_and_is_named(batch: Batch) -> None:
    class NoChunks(BaseTask):
        name, schedule = "no_chunks", None

        def run(self) -> None:
            raise ValueError("no")

    await add_users(3)
    told = r"marks was not killed after chunk 3: it committed 2, and succeeded$"
    with pytest.raises(AssertionError, match=told):
        await batch.run(Marks, kill_after_chunk=3)
    told = r"no_chunks was not killed after chunk 1: it committed 0, and failed \(ValueError: no\)$"
    with pytest.raises(AssertionError, match=told):
        await batch.run(NoChunks, kill_after_chunk=1)
    with pytest.raises(BatchError, match="there is no run to resume"):
        await batch.resume()


@on_sqlite
async def test_a_run_that_can_t_be_killed_or_resumed_is_refused(batch: Batch) -> None:
    await add_users(3)
    for wrong in (0, True, "3"):
        with pytest.raises(ValueError, match=r"kill_after_chunk is .*; allowed: an int from 1"):
            await batch.run(Marks, kill_after_chunk=wrong)  # type: ignore[arg-type]
    with pytest.raises(
        BatchError, match=r"no run to resume: call `batch\.run\(…, kill_after_chunk=…\)` first"
    ):
        await batch.resume()
    assert batch.runs() == []
    killed = await batch.run(Marks, kill_after_chunk=1)
    with pytest.raises(BatchError, match=f"run {killed.id} was killed before; call `batch.resume"):
        await batch.run(Child, kill_after_chunk=1)
    await batch.resume()
    with pytest.raises(BatchError, match="there is no run to resume"):
        await batch.resume()


@on_sqlite
async def test_chunks_that_were_rolled_back_are_not_among_them(batch: Batch) -> None:
    class Careful(BaseTask):
        name, schedule = "careful", None

        async def run(self) -> None:
            failed = False
            async for chunk in self.chunks([1, 2, 3], size=2):
                try:
                    async with chunk:
                        if not failed:
                            failed = True
                            raise ValueError
                except ValueError:
                    pass

    run = await batch.run(Careful)
    assert (run.state, [chunk.number for chunk in run.chunks]) == ("succeeded", [1, 2])
    assert (await batch.run(Child)).chunks == [
        CommittedChunk("1", 1, [1]),
        CommittedChunk("1", 2, [2]),
    ]


@on_sqlite
async def test_the_event_loop_is_left_as_it_was(batch: Batch) -> None:
    loop = asyncio.get_running_loop()
    before, tasks = loop.get_task_factory(), asyncio.all_tasks()
    Beside.slow_may_go_on.clear()
    await batch.run(Beside, kill_after_chunk=1)
    assert (loop.get_task_factory(), asyncio.all_tasks()) == (before, tasks)


async def test_not_even_a_step_that_was_already_due_is_made() -> None:
    steps: list[int] = []

    async def walk() -> None:
        try:
            while True:
                steps.append(len(steps))
                await asyncio.sleep(0)
        finally:
            steps.clear()

    kill = Kill("a run", after_chunk=1, on_kill=lambda: None)
    walking = asyncio.create_task(FreezableCoroutine(walk(), kill))
    await asyncio.sleep(0)
    kill.committed("a run")
    for _ in range(3):
        await asyncio.sleep(0)
    walking.cancel()
    await asyncio.wait([walking])
    assert (steps, walking.cancelled()) == ([0], True)


class Letter(BaseTask):
    name, schedule = "letter", None

    async def run(self, to: int = 0) -> int:
        return to


class Letters(BaseTask):
    """Starts a run for each number, in its chunks. The first attempt fails in the second chunk."""

    name, schedule, retry = "letters", None, Retry(attempts=2)

    async def run(self) -> None:
        async for chunk in self.chunks(range(6), size=2):
            async with chunk as (db, numbers):
                for number in numbers:
                    await start(Letter, to=number, session=db)
                if chunk.number == 2 and current_run().attempt == 1:
                    raise OSError("no network")


async def test_each_chunk_starts_its_runs_exactly_once(batch: Batch) -> None:
    batch.add(Letter, Letters)
    killed = await batch.run(Letters, kill_after_chunk=2)
    assert killed.attempt == 2
    resumed = await batch.resume()
    assert resumed.state == "succeeded"
    await batch.settle()
    assert sorted(run.result for run in batch.runs(Letter)) == [0, 1, 2, 3, 4, 5]
    assert {run.state for run in batch.runs(Letter)} == {"succeeded"}
