"""Mistakes in calls. Both checkers report each line that is marked, and no other."""

from pydantic_settings import BaseSettings
from sqlalchemy import select

import batch_system
from batch_system import (
    BaseTask,
    DomainError,
    TaskRegistry,
    call_async,
    call_db,
    current_run,
    get_db,
    get_logger,
    get_settings,
    start,
    testing,
)
from batch_system.testing import Batch
from service.application.models import User

logger = get_logger(5)  # refused
print(batch_system.no_such_name)  # refused
print(testing.no_such_name)  # refused


class Own(BaseSettings):
    DAYS: int = 7


class Calls(BaseTask):
    name = "calls"
    schedule = None

    async def run(self) -> int:
        run_id: int = await start(Calls)  # refused
        await start("calls")  # refused
        await start(Calls, key=5)  # refused
        await start(Calls, slot="2026-01-01")  # refused
        get_settings().MAX_RUNNING.upper()  # refused
        print(get_settings(Own).HOURS)  # refused
        days: str = get_settings(Own).DAYS  # refused
        current_run().progress("half")  # refused
        current_run().slot = None  # refused
        with get_db():  # refused
            pass
        async with get_db(read_only=True):  # refused
            print(run_id, days)
        return "done"  # refused


@TaskRegistry.register
class SyncCalls(BaseTask):
    name = "sync_calls"
    schedule = None

    def run(self) -> None:
        count: int = call_db(lambda db: list(db.scalars(select(User.email))))  # refused
        call_async(start)  # refused
        raise DomainError(count)  # refused


class NotATask:
    name = "not_a_task"


TaskRegistry.register(NotATask)  # refused


async def test_a_task(batch: Batch) -> None:
    run = await batch.run(Calls)
    assert run.state.succeeded  # refused
    run.state = "failed"  # refused
    await batch.run(Calls, kill_after_chunk="3")  # refused
    await batch.resume(Calls)  # refused
    print(run.chunks[0].cursor)  # refused
    await batch.advance(hours="one")  # refused
    batch.fail_next(Calls, "no network")  # refused
    for line in run.logs:
        print(line.text + 5)  # refused
