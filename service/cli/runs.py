"""Commands about runs."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli import complete, manage, progress, watch
from service.cli.opening import ask
from service.cli.options import AsJson, OfTask, TaskName, instant, instant_or_age, pairs, user, wait_for, whole
from service.errors import InvalidParameters

if TYPE_CHECKING:
    from service.cli.bar import Bar, Lines
    from service.operations.operations import Operations
    from service.operations.results import Started
    from service.server.batch_service import BatchService

BAR_AFTER_SECONDS = 1.0
"""A run that is over by then needs no bar."""


def run(
    name: TaskName,
    param: Annotated[list[str] | None, typer.Option("--param", help="A parameter of run(), as name=value.")] = None,
    slot: Annotated[str | None, typer.Option(help="The instant to run it for (ISO 8601); default: now.")] = None,
    queue: Annotated[
        bool, typer.Option("--queue", help="Leave it to a running service, and print the run's id.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="With --queue: show the log until the run ends.")] = False,
) -> None:
    """Run a task here and now, record the run, show its log.

    The exit code is 1 when it fails. It needs no service, and works beside one. With --queue it does not run here: a
    service takes it, after what the task has to do already.
    """
    at = instant(slot, "--slot") if slot is not None else None
    if queue:
        _queue(name, pairs(param or []), at, wait)
    elif wait:
        raise InvalidParameters("--wait goes with --queue; without it the run is waited for anyway")
    else:
        _execute(name, pairs(param or []), at)


def _execute(name: str, given: dict[str, str], slot: datetime | None) -> None:
    import asyncio

    from service import console
    from service.cli import bar
    from service.logs import get_logger

    def tell(row: Mapping[str, Any], text: str) -> None:
        get_logger("service.batch").info(text, run=row["id"])

    try:
        with bar.display(sys.stderr, tell, states=False, after=BAR_AFTER_SECONDS) as shown:
            row = wait_for(_run(name, given, slot, shown))
    except asyncio.CancelledError:
        raise SystemExit(128 + signal.SIGTERM) from None
    console.say(progress.told_end(row))
    if row["result"] is not None:
        console.show_json(row["result"])
    raise SystemExit(0 if row["state"] == "succeeded" else 1)


def _queue(name: str, given: dict[str, str], slot: datetime | None, wait: bool) -> None:
    from service import console

    async def work(operations: Operations) -> tuple[Started, str | None]:
        started = await operations.runs.start(name, given, slot)
        return started, await manage.hint_if_unserved(operations, name)

    started, hint = ask(work)
    console.say(f"run {started.id} queued", flush=True)
    manage.warn(hint)
    if wait:
        watch.with_log(started.id)


def runs(
    task: OfTask = None,
    state: Annotated[str | None, typer.Option(help="Only in this state.", autocompletion=complete.states)] = None,
    since: Annotated[str | None, typer.Option(help="Only made since: ISO 8601, or an age such as 2h or 7d.")] = None,
    limit: Annotated[int, typer.Option(parser=whole(1, 100_000), metavar="NUMBER", help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List runs, newest first.

    `batch show ID` has all about one of them.
    """
    from service import console

    after = instant_or_age(since, "--since") if since is not None else None
    listed = ask(lambda operations: operations.runs.list(task, state, after, limit), log_level="WARNING")
    rows = [run.model_dump() for run in listed]
    shown = ["id", "task", "slot", "origin", "state", "attempt", "started_at", "finished_at", "progress", "reason"]
    console.show(rows if as_json else [{**row, "progress": progress.brief(row)} for row in rows], shown, as_json)


async def _run(name: str, given: dict[str, str], slot: datetime | None, shown: Bar | Lines) -> dict[str, Any]:
    import asyncio

    from service import logs as logging
    from service.batch.execution.run_here import ManualRun
    from service.batch.tasks.registry import TaskRegistry
    from service.config import get_settings
    from service.server.batch_service import BatchService

    settings = get_settings()
    logging.set_up(settings.LOG_LEVEL, settings.LOG_FORMAT, shown.log_stream)
    batch = BatchService(settings, fires=False)
    await batch.start()
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    try:
        manual = ManualRun(batch.ledger, batch.engine, TaskRegistry.get(name), batch.node.id)
        async with watch.seen(batch.operations, manual.id, shown), _drained(batch, settings.DRAIN_SECONDS):
            return await manual.execute(given, slot, requested_by=user())
    finally:
        await batch.stop()
        logging.flush()


@asynccontextmanager
async def _drained(batch: BatchService, seconds: float) -> AsyncIterator[None]:
    """When the block is cancelled: what runs has so many seconds to end, and is still shown."""
    import asyncio

    from service import logs

    try:
        yield
    except asyncio.CancelledError:
        if batch.engine.running:
            text = f"stopping: the run has {seconds:g} s to end, or is resumed by a service"
            logs.get_logger("service.batch").info(text)
        await batch.drain()
        raise
