"""The tasks of which the recorded states have runs. Whoever takes a state over loads them too."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from batch_system import (
    BaseTask,
    Done,
    ItemTask,
    Part,
    PartitionedTask,
    Retry,
    Skip,
    Start,
    TaskRegistry,
    current_run,
    get_db,
    get_logger,
    once,
    start_all,
)
from service.application.models import User

logger = get_logger(__name__)

ITEMS = 60


class TickTask(BaseTask):
    """Has runs of slots, and a range of slots that were missed."""

    name, schedule = "tick", "0 * * * *"

    async def run(self) -> str:
        logger.info("tick, 日本語")
        return "done"


class _CopyTask(BaseTask):
    """Adds a user for each item, in chunks. No two may have one address: an item that is done twice
    fails the run.
    """

    schedule = None

    async def run(self, pause: float = 0.0) -> int:
        copied = 0
        async for chunk in self.chunks(range(ITEMS), size=4, name="items"):
            async with chunk as (db, items):
                db.add_all(User(email=f"{self.name}{item:02}@example.com") for item in items)
                copied += len(items)
            await asyncio.sleep(pause)
        return copied


class MovesTask(_CopyTask):
    name = "moves"


class CopiesTask(_CopyTask):
    name = "copies"


class FlakyTask(BaseTask):
    """Waits for its second attempt."""

    name, schedule = "flaky", None
    retry = Retry(attempts=2, wait=timedelta(days=1), max_wait=timedelta(days=1))

    async def run(self) -> None:
        raise RuntimeError("the flaky task fails")


class BrokenTask(BaseTask):
    name, schedule = "broken", None

    async def run(self) -> None:
        raise ValueError("the broken task always fails")


class HeldTask(BaseTask):
    """Waits in the queue while its task is paused."""

    name, schedule = "held", None

    async def run(self) -> str:
        async with get_db() as db:
            await once(db, "the held task has run")
            await db.commit()
        return "held no more"


class SlowTask(BaseTask):
    name, schedule = "slow", None

    async def run(self) -> None:
        await asyncio.sleep(3600)


class SortTask(ItemTask):
    """Sets one user aside."""

    name, schedule = "sort", None
    skip = Skip(limit=10)

    def items(self) -> Select[Any]:
        return select(User).where(User.id <= 3)

    async def save(self, item: User, fetched: Any, db: AsyncSession) -> None:
        if item.email == "bad@example.com":
            raise ValueError("this user can't be sorted")


class GathersTask(BaseTask):
    """Starts a group while no service runs, so its follow-up waits for a member that nobody has
    begun.
    """

    name, schedule = "gathers", None

    async def run(self) -> None:
        await start_all([Start(MemberTask)], then=Start(FollowsTask))


class MemberTask(BaseTask):
    name, schedule = "member", None

    async def run(self) -> None:
        pass


class FollowsTask(BaseTask):
    name, schedule = "follows", None

    async def run(self) -> str:
        return "the group is over"


class AfterTickTask(BaseTask):
    """Each of its slots waits for the one of tick."""

    name, after = "after_tick", "tick"

    async def run(self, slot: datetime) -> str:
        return f"after the tick of {slot:%H:%M}"


class _PartsTask(PartitionedTask):
    """What its join() returns is the sum of the results of its parts."""

    schedule = None

    async def join(self, parts: list[Done]) -> int:
        return sum(done.result for done in parts)


class SpreadsTask(_PartsTask):
    """Adds users in three parts. The first one is short, and the others pause once, after two
    chunks.
    """

    name, parallel = "spreads", 2

    async def split(self, pause: float = 0.0) -> list[Part]:
        bounds = (0, 2, 32, ITEMS)
        return [Part(first=first, last=last, pause=pause) for first, last in pairwise(bounds)]

    async def work(self, part: Part) -> int:
        loop = self.chunks(range(part["first"], part["last"]), size=4, name="items")
        async for chunk in loop:
            async with chunk as (db, items):
                db.add_all(User(email=f"{self.name}{item:02}@example.com") for item in items)
            if loop.done == 8:
                await asyncio.sleep(part["pause"])
        return loop.done


class HalvesTask(_PartsTask):
    """Fails because of its second part, which succeeds when it is retried."""

    name = "halves"

    async def split(self) -> list[Part]:
        return [Part(half=1), Part(half=2)]

    async def work(self, part: Part) -> int:
        if part["half"] == 2 and current_run().attempt == 1:
            raise ValueError("the second half fails once")
        return int(part["half"])


class JoinedTask(_PartsTask):
    """Is over: its parts have succeeded, and were joined."""

    name = "joined"

    async def split(self) -> list[Part]:
        return [Part(number=number) for number in (3, 4, 5)]

    async def work(self, part: Part) -> int:
        return int(part["number"])


for task in (
    TickTask,
    MovesTask,
    CopiesTask,
    FlakyTask,
    BrokenTask,
    HeldTask,
    SlowTask,
    SortTask,
    GathersTask,
    MemberTask,
    FollowsTask,
    AfterTickTask,
    SpreadsTask,
    HalvesTask,
    JoinedTask,
):
    TaskRegistry.register(task)
