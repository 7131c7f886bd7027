"""What the services run while they are disturbed. It is copied into their tasks/.

Each body says in a file outside the databases what it does, with boot time, which no clock step
moves. And it writes into a table of the application's database, through `get_db()`.
"""

import asyncio
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from sqlalchemy import text
from sqlalchemy.orm import Session

from batch_system import (
    After,
    BaseTask,
    Done,
    Missed,
    Part,
    PartitionedTask,
    Retry,
    Start,
    Upstream,
    call_db,
    current_run,
    get_db,
    start,
    start_all,
)

FIRES = os.environ["WITNESS_FIRES"] == "yes"
FILE = os.environ["WITNESS_FILE"]
INSERT = text("INSERT INTO witness (run, task, fence, part) VALUES (:run, :task, :fence, :part)")
SEEN = text("SELECT number FROM witness WHERE run = :run")


def every(cron: str) -> str | None:
    return cron if FIRES else None


def node() -> int:
    """The pid of the node: of this process, or in a child of the worker whose nursery has forked
    this process.
    """
    with open("/proc/self/cmdline") as file:
        is_child = "batch.pools" in file.read()
    if not is_child:
        return os.getpid()
    with open(f"/proc/{os.getppid()}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def tell(event: str, **more: object) -> None:
    """One line, in one write, so that those of several processes don't mix."""
    run = current_run()
    line = {
        "event": event,
        "run": run.id,
        "task": run.task,
        "slot": run.slot.isoformat(),
        "fence": run.fence,
        "pid": node(),
        "at": time.clock_gettime(time.CLOCK_BOOTTIME),
        **more,
    }
    file = os.open(FILE, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    os.write(file, f"{json.dumps(line)}\n".encode())
    os.close(file)


def row(part: int) -> dict[str, object]:
    run = current_run()
    return {"run": run.id, "task": run.task, "fence": run.fence, "part": part}


@contextmanager
def told(**more: object) -> Iterator[None]:
    tell("start", **more)
    try:
        yield
    except BaseException as error:
        tell("end", how=type(error).__name__)
        raise
    tell("end", how="ok")


async def look() -> None:
    """What earlier attempts of this run have committed: they can't commit more from here on."""
    if current_run().fence > 1:
        async with get_db(readonly=True) as db:
            tell("seen", numbers=list(await db.scalars(SEEN, {"run": current_run().id})))


async def write(part: int = 1, seconds: float = 0.01) -> None:
    """One transaction, open for so long."""
    async with get_db() as db:
        await db.execute(INSERT, row(part))
        await asyncio.sleep(seconds)
        tell("committing", part=part)
        await db.commit()


def write_in_thread(part: int) -> None:
    values = row(part)
    tell("committing", part=part)

    def insert(db: Session) -> None:
        db.execute(INSERT, values)
        db.commit()

    call_db(insert)


class TickTask(BaseTask):
    name, schedule, missed = "tick", every("* * * * * *"), Missed("all", max_count=20)

    async def run(self) -> int:
        with told():
            await look()
            await write()
        return 1


class SlowTask(BaseTask):
    """Longer than a lease, with a commit now and then."""

    name, schedule, pool = "slow", every("*/2 * * * * *"), "cpu"

    async def run(self) -> int:
        with told():
            await look()
            for part in range(1, 7):
                for _ in range(5):
                    current_run().checkpoint()
                    await asyncio.sleep(0.1)
                await write(part)
        return 6


class LockTask(BaseTask):
    """Much of its time is spent inside of transactions."""

    name, schedule, overlap = "lock", every("*/3 * * * * *"), "wait"

    async def run(self) -> int:
        with told():
            await look()
            for part in range(1, 4):
                await write(part, seconds=0.4)
                await asyncio.sleep(0.3)
        return 3


class EagerTask(BaseTask):
    """Commits all the time: one that was frozen and wakes tries it at once, before anybody can tell
    it to stop.
    """

    name, schedule, overlap = "eager", every("*/3 * * * * *"), "wait"

    async def run(self) -> int:
        with told():
            await look()
            for part in range(1, 51):
                await write(part, seconds=0)
                await asyncio.sleep(0.03)
        return 50


class QuietTask(BaseTask):
    """Needs no database, so it goes on without one: until its node gives it up."""

    name, schedule, overlap = "quiet", every("*/3 * * * * *"), "wait"

    async def run(self) -> int:
        with told():
            for _ in range(20):
                await asyncio.sleep(0.2)
                tell("step")
        return 0


class SyncTask(BaseTask):
    name, schedule, overlap = "sync", every("*/3 * * * * *"), "allow"
    pool = "cpu"

    def run(self) -> int:
        with told():
            for part in range(1, 5):
                time.sleep(0.3)
                write_in_thread(part)
        return 4


class ManyTask(BaseTask):
    name, schedule, overlap, max_running = "many", every("*/2 * * * * *"), "wait", 2
    pool = "cpu"

    async def run(self) -> int:
        with told():
            await look()
            await asyncio.sleep(1.5)
            await write()
        return 1


class ReplacedTask(BaseTask):
    name, schedule, overlap = "replaced", every("*/2 * * * * *"), "replace"

    async def run(self) -> int:
        with told():
            await look()
            await asyncio.sleep(1.5)
            await write()
        return 1


class OnceTask(BaseTask):
    """Never begun a second time."""

    name, schedule, rerun = "once", every("*/2 * * * * *"), False

    async def run(self) -> int:
        with told():
            await asyncio.sleep(0.8)
            await write()
        return 1


class FlakyTask(BaseTask):
    name, schedule, retry = "flaky", every("*/2 * * * * *"), Retry(attempts=3, wait=0.3, jitter=0)
    pool = "cpu"

    async def run(self) -> int:
        with told():
            await look()
            await write()
            if current_run().attempt < 3:
                raise ConnectionError("not yet")
        return 1


class FailingTask(BaseTask):
    name, schedule, retry = "failing", every("*/5 * * * * *"), Retry(attempts=2, wait=0.2, jitter=0)

    def run(self) -> None:
        with told():
            time.sleep(0.2)
            raise ValueError("as always")


class LoadTask(BaseTask):
    """Its slots are those of another task, for which they wait."""

    name, schedule, overlap = "load", None, "wait"
    after = "many" if FIRES else None

    async def run(self) -> int:
        with told():
            await look()
            await asyncio.sleep(0.5)
            await write()
        return 1


class GatherTask(BaseTask):
    """Its slots wait for the end of those of two others, one of which always fails, but not for
    long.
    """

    name, schedule, overlap = "gather", every("*/6 * * * * *"), "replace"
    after = After("load", "failing", within=15, on="end") if FIRES else None

    async def run(self) -> int:
        with told():
            await look()
            await write()
        return 1


class NewsTask(BaseTask):
    """Starts a group and a run that begins later: once, however often it is begun itself. Of two
    groups that follow each other, at most one keeps its follow-up from beginning.
    """

    name, schedule, overlap = "news", every("*/5 * * * * *"), "wait"

    async def run(self, slot: datetime) -> int:
        number = slot.second // 5
        with told():
            await look()
            letters = [Start(LetterTask, number=each, fails=number % 3 == 0) for each in range(4)]
            follow_up = Start(DigestTask, on="end" if number % 2 else "success")
            await start_all(letters, then=follow_up, key=f"{slot:%FT%T}")
            tell("asked")
            await start(LaterTask, delay=1.5, key=f"{slot:%FT%T}")
            await write()
        return 1


class LetterTask(BaseTask):
    """A member of a group. The second one brings in another, the third succeeds at last, and the
    first may fail.
    """

    name, schedule, overlap, retry = "letter", None, "allow", Retry(attempts=2, wait=0.2, jitter=0)
    pool = "cpu"

    async def run(self, number: int, fails: bool) -> int:
        with told():
            await look()
            await asyncio.sleep(0.2 * number)
            if number == 1:
                await start(
                    LetterTask, number=9, fails=False, in_group=True, key=f"late {current_run().id}"
                )
            await write()
            if (number == 0 and fails) or (number == 2 and current_run().attempt == 1):
                raise ConnectionError("not yet")
        return 1


class DigestTask(BaseTask):
    """The follow-up of a group."""

    name, schedule, overlap = "digest", None, "allow"

    async def run(self, upstream: Upstream) -> int:
        with told():
            await look()
            tell("members", ids=[done.run async for done in upstream])
            await write()
        return 1


class LaterTask(BaseTask):
    name, schedule, overlap = "later", None, "allow"

    async def run(self) -> int:
        with told():
            await write()
        return 1


PARTS, ITEMS = 4, 9
"""Into how many parts a run is split, and how many items each of them has."""


class SumsTask(PartitionedTask):
    """Its parts run on all services. Each item of a part is a row, and the second part fails after
    its first chunk.
    """

    name, schedule, overlap, parallel = "sums", every("*/6 * * * * *"), "wait", 3
    retry = Retry(attempts=2, wait=0.2, jitter=0)

    async def split(self) -> list[Part]:
        with told():
            await asyncio.sleep(0.1)
            of = current_run().id
            return [
                Part(of=of, first=each * ITEMS, stop=(each + 1) * ITEMS) for each in range(PARTS)
            ]

    async def work(self, part: Part) -> int:
        with told(of=part["of"]):
            await look()
            loop = self.chunks(range(part["first"], part["stop"]), size=3)
            async for chunk in loop:
                async with chunk as (db, items):
                    for item in items:
                        await db.execute(INSERT, row(item))
                    await asyncio.sleep(0.2)
                    tell("committing", part=items[-1])
                if part.number == 2 and current_run().attempt == 1:
                    raise ConnectionError("not yet")
        return loop.done

    async def join(self, parts: list[Done]) -> int:
        with told():
            tell("joined", parts=[(done.part, done.run) for done in parts])
            await asyncio.sleep(0.1)
        return sum(done.result for done in parts)


class PooledSumsTask(SumsTask):
    """The same on workers, and in the children of one of them. The first part that fails stops the
    others.
    """

    name, pool, fail_fast = "pooled_sums", "cpu", True
