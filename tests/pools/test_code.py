"""What the code of a run finds in a child: its run, its log, its output, its progress, `start()`,
and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from io import StringIO
from pathlib import Path

import pytest

from batch_system import TaskRegistry, logs
from batch_system.batch.ledger.states import RunState
from batch_system.batch.queue import enqueue
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from batch_system.logs.log_lines import LONGEST_LINE
from tests.batch.ledger_world import know, rows, until
from tests.pools.world import World, pool_of, shared_pool

TASKS = """
class Facts(_Pooled):
    name, schedule, timezone = "facts", "0 2 * * *", "Europe/Berlin"
    def run(self, slot: datetime, number: int = 1) -> dict:
        run = current_run()
        return {
            "id": run.id, "slot": run.slot, "given": slot, "previous": run.previous_slot,
            "attempt": run.attempt, "fence": run.fence, "origin": run.origin,
            "key": run.idempotency_key("a"), "number": number + 1,
        }

class Logs(_Pooled):
    name = "logs"
    async def run(self) -> None:
        logger.info("first", number=1, text="a b")
        import logging
        logging.getLogger("library").warning("second %s", 2)
        try:
            raise ValueError("inner")
        except ValueError:
            logger.exception("third")
        logger.debug("not shown")
        thread = threading.Thread(target=logger.info, args=("from a thread",))
        thread.start()
        thread.join()

class Prints(_Pooled):
    name = "prints"
    def run(self, times: int = 1, size: int = 10) -> None:
        for _ in range(times):
            os.write(1, b"x" * size + b"\\n")
        print("printed")
        print("to stderr", file=sys.stderr)
        subprocess.run(["echo", "from another process"], check=True)

class Counts(_Pooled):
    name = "counts"
    def run(self, seen: str) -> None:
        current_run().progress(1, 10, "begins")
        while not os.path.exists(seen):
            time.sleep(0.01)
        current_run().progress(10, 10)

class Opens(_Pooled):
    name = "opens"
    def run(self) -> list:
        found = []
        for name in sorted(os.listdir("/proc/self/fd"), key=int):
            try:
                found.append(os.readlink(f"/proc/self/fd/{name}").split(":")[0])
            except OSError:
                pass
        masked = sorted(signal.pthread_sigmask(0, []))
        return [found, random.random(), os.getpid() == os.getpgid(0), masked]

class Other(_Pooled):
    name = "other"
    def run(self, number: int = 1) -> None: ...

class Missing(_Pooled):
    name = "missing"
    def run(self) -> None: ...

class Starts(_Pooled):
    name = "starts"
    async def run(self) -> list:
        found = [await start(Other, number=5, key="one"), await start(Other, number=6, key="one")]
        for task, params in ((Other, {"number": "x"}), (Missing, {})):
            try:
                await start(task, **params)
            except Exception as error:
                found.append([type(error).__name__, str(error)])
        return found

class SyncStarts(_Pooled):
    name = "sync_starts"
    def run(self) -> str:
        return call_async(start(Other))
"""
TASKS = TASKS.replace("class Facts", "from datetime import datetime\nclass Facts", 1)


@pytest.fixture(scope="module")
async def shared(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[tuple[World, dict[str, Task]]]:
    """One nursery for the tests of this file."""
    async with shared_pool(tmp_path_factory.mktemp("pool"), TASKS) as shared:
        yield shared


@pytest.mark.rest
async def test_the_run_is_as_in_any_process(world: World) -> None:
    begun = world.begin("facts", number=3, fence=7, id="01a222bb-25ab-7510-ba2f-71e27408d247")
    facts = (await begun.ending()).result
    run = begun.attempt.run
    assert facts == {
        "id": run.id,
        "slot": "2026-11-25T03:00:00+01:00",
        "given": "2026-11-25T03:00:00+01:00",
        "previous": "2026-11-25T02:00:00+01:00",
        "attempt": 3,
        "fence": 7,
        "origin": "manual",
        "key": run.idempotency_key("a"),
        "number": 2,
    }
    wrong = await world.ending_of("facts", unknown=1)
    assert wrong.state == RunState.FAILED and "InvalidParameters" in (wrong.reason or "")


LINES = [
    ("info", "authors", "first number=1 text='a b'"),
    ("warning", "library", "second 2"),
    ("error", "authors", "third"),
    ("info", "authors", "from a thread"),
]


async def test_lines_are_kept_once_in_an_application_with_logging_of_its_own(
    caplog: pytest.LogCaptureFixture, world: World
) -> None:
    caplog.set_level(logging.INFO)
    begun = world.begin("logs")
    await begun.ending()
    assert [(line.level, line.logger, line.text.split("\n")[0]) for line in begun.log] == LINES
    assert [(r.levelname.lower(), r.name, r.getMessage()) for r in caplog.records] == LINES
    assert "ValueError: inner" in begun.lines[2] and 'raise ValueError("inner")' in begun.lines[2]
    times = [line.at for line in begun.log]
    assert times == sorted(times) and all(at.endswith("Z") for at in times)


async def test_lines_are_written_once_to_the_log_of_the_service_with_their_values() -> None:
    stream = StringIO()
    logs.set_up(format="json", stream=stream)
    try:
        async with pool_of(TASKS) as world:
            begun = world.begin("logs")
            await begun.ending()
            assert [
                (line.level, line.logger, line.text.split("\n")[0]) for line in begun.log
            ] == LINES
        logs.flush()
        written = [json.loads(line) for line in stream.getvalue().splitlines()]
        ours = [line for line in written if line.get("run") == begun.attempt.claimed.id]
        assert [line["event"] for line in ours] == ["first", "second 2", "third", "from a thread"]
        assert (ours[0]["number"], ours[0]["text"], ours[0]["task"]) == (1, "a b", "logs")
        assert [line["timestamp"] for line in ours] == [line.at for line in begun.log]
        assert 'raise ValueError("inner")' in ours[2]["exception"]
    finally:
        logs.flush()
        logs.mode.mode.is_set_up = False
        logging.getLogger().handlers[:] = [
            h for h in logging.getLogger().handlers if "batch_system" not in type(h).__module__
        ]


async def test_output_becomes_lines_of_the_run_and_is_bounded(world: World) -> None:
    begun = world.begin("prints")
    await begun.ending()
    assert [(line.level, line.logger, line.text) for line in begun.log] == [
        ("info", "stdout", text)
        for text in ("x" * 10, "printed", "to stderr", "from another process")
    ]
    begun = world.begin("prints", times=3, size=3_000_000)
    await begun.ending()
    assert all(len(line) <= LONGEST_LINE + 40 for line in begun.lines)
    assert begun.lines[0].endswith("x... (cut: 2,900,000 more bytes)") or "cut: " in begun.lines[0]
    assert begun.lines[-1] == "from another process"


@pytest.mark.rest
async def test_a_flood_of_output_leaves_the_event_loop_to_others(world: World) -> None:
    """How long the loop's thread works between two turns of another task: how long it waits is up
    to the machine.
    """
    begun = world.begin("prints", times=12_000, size=50)
    longest, before = 0.0, time.thread_time()
    while not begun.over.is_set():
        await asyncio.sleep(0.01)
        longest, before = max(longest, time.thread_time() - before), time.thread_time()
    lines = begun.lines
    assert len(lines) == 10_001 and "lines were dropped" in lines[-1]
    assert longest < 0.5


async def test_progress_comes_while_the_run_goes_on(world: World, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    begun = world.begin("counts", seen=str(seen))
    meter = begun.attempt.state.meter
    progress = await until(lambda: asyncio.sleep(0, meter.latest()))
    assert (progress.done, progress.total, progress.message) == (1, 10, "begins")
    assert not begun.over.is_set()
    seen.touch()
    await begun.ending()
    last = meter.latest()
    assert last is not None and (last.done, last.total, last.message) == (10, 10, "begins")


async def test_nothing_of_the_service_is_open_in_a_child(world: World) -> None:
    endings = await asyncio.gather(*(world.ending_of("opens") for _ in range(3)))
    kinds, numbers = (
        [ending.result[0] for ending in endings],
        {ending.result[1] for ending in endings},
    )
    assert len(numbers) == 3
    for opened in kinds:
        # stdin, stdout and stderr; three sockets: to the service, and two of its event loop, which
        # has one more file; and the lease, whose mapping has a copy of its descriptor. From 3.5 on,
        # libffi, with which ctypes calls, keeps its own file open.
        assert opened[:3] == ["/dev/null", "pipe", "pipe"]
        rest = sorted(kind for kind in opened[3:] if "/libffi.so" not in kind)
        assert rest == ["/memfd"] * 2 + ["anon_inode"] + ["socket"] * 3
    assert all(ending.result[2:] == [True, []] for ending in endings)


async def test_start_queues_runs_through_the_service(ledger: Database, world: World) -> None:
    tasks = TaskRegistry.tasks()
    await know(ledger, *(task for name, task in tasks.items() if name != "missing"))
    woken: list[bool] = []
    enqueue.use_service(ledger, lambda: woken.append(True))
    try:
        begun = world.begin("starts")
        first, second, invalid, unknown = (await begun.ending()).result
        assert first == second and len(woken) == 2
        [row] = await rows(ledger)
        assert (row["id"], row["params"], row["task"]) == (first, {"number": 5}, "other")
        assert (row["requested_by"], row["parent"]) == ("task starts", begun.attempt.claimed.id)
        assert invalid[0] == "InvalidParameters" and "number" in invalid[1]
        assert unknown[0] == "UnknownTask" and "no service has loaded this task" in unknown[1]
        assert isinstance((await world.ending_of("sync_starts")).result, str)
        assert len(await rows(ledger)) == 2
    finally:
        enqueue.use_no_service()


async def test_a_ledger_that_can_not_be_reached_is_the_same_error_in_a_child(world: World) -> None:
    gone = Database(
        "postgresql+asyncpg://nobody@127.0.0.1:1/none", setting="LEDGER_URL", pooled=False
    )
    enqueue.use_service(gone, lambda: None)
    try:
        ended = await world.ending_of("sync_starts")
        assert (ended.reason or "").startswith("DatabaseUnreachable: ")
    finally:
        enqueue.use_no_service()
        await gone.dispose()
