"""`batch run`."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batch_system import clock
from batch_system.cli import hints, progress, watch
from batch_system.cli.opening import ask, refuse_service
from batch_system.cli.options import AsJson, TaskName, instant, pairs, user, wait_for
from batch_system.errors import InvalidParameters

if TYPE_CHECKING:
    from batch_system.cli.bar import Bar, Lines
    from batch_system.operations.asking.results import RunNow, Started
    from batch_system.server.service import BatchService
    from batch_system.verbs.following import Operations

BAR_AFTER_SECONDS = 1.0
"""The bar is shown if the run takes longer than this."""


def run(
    name: TaskName,
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param", help="A parameter of run(), as name=value. May be given several times."
        ),
    ] = None,
    slot: Annotated[
        str | None,
        typer.Option(
            help="The slot of the run: the instant for which it runs (ISO 8601); default: now."
        ),
    ] = None,
    queue: Annotated[
        bool, typer.Option("--queue", help="Queue the run for a running service, and print its id.")
    ] = False,
    note: Annotated[
        str | None, typer.Option(help="With --queue: why, which stands among the changes.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="With --queue: show the log until the run ends.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a task now in this process, record the run, and show its log.

    The exit code is 1 if the run does not succeed. The command works whether a service is running
    or not. With --queue the task does not run in this process: a running service executes it, after
    the waiting runs of the task, or a worker of its pool does. With --json the run is printed as
    JSON, and its log goes to stderr.
    """
    at = instant(slot, "--slot") if slot is not None else None
    if queue:
        _queue(name, pairs(param or []), at, note, wait, as_json)
    elif wait:
        raise InvalidParameters(
            "--wait needs --queue; without --queue, the command always waits for the run"
        )
    elif note is not None:
        raise InvalidParameters("--note needs --queue: a run of this process has no note")
    else:
        refuse_service("`batch run` without --queue")
        _execute(name, pairs(param or []), at, as_json)


def _execute(name: str, parameters: dict[str, str], slot: datetime | None, as_json: bool) -> None:
    import asyncio

    from batch_system.cli import bar
    from batch_system.logs import get_logger

    def log_line(row: Mapping[str, Any], text: str) -> None:
        get_logger("batch_system.batch").info(text, run=row["id"])

    try:
        with bar.display(sys.stderr, log_line, states=False, after=BAR_AFTER_SECONDS) as display:
            now = wait_for(_run(name, parameters, slot, display))
    except asyncio.CancelledError:
        raise SystemExit(128 + signal.SIGTERM) from None
    progress.print_end(now, as_json)
    raise SystemExit(0 if now.state == "succeeded" else 1)


def _queue(
    name: str,
    parameters: dict[str, str],
    slot: datetime | None,
    note: str | None,
    wait: bool,
    as_json: bool,
) -> None:
    from batch_system import console
    from batch_system.verbs.run_changes import StartRun

    async def work(operations: Operations) -> tuple[Started, str | None]:
        started = await operations(StartRun(name=name, parameters=parameters, slot=slot, note=note))
        return started, await hints.hint_if_unserved(operations, name)

    started, hint = ask(work)
    if not as_json:
        console.say(f"run {started.id} queued", flush=True)
    elif not wait:
        console.show_json(started)
    hints.warn(hint)
    if wait:
        watch.with_log(started.id, as_json)


async def _run(
    name: str, parameters: dict[str, str], slot: datetime | None, display: Bar | Lines
) -> RunNow:
    import asyncio

    from batch_system import logs as logging
    from batch_system.batch.execution.run_here import ManualRun, refuse_other_pools
    from batch_system.batch.nodes.roles import BY_HAND
    from batch_system.batch.tasks.registry import TaskRegistry
    from batch_system.operations.asking.results import RunNow
    from batch_system.server.service import BatchService
    from batch_system.settings.reading import get_settings

    settings = get_settings()
    logging.set_up(settings.LOG_LEVEL, settings.LOG_FORMAT, display.log_stream)
    batch = BatchService(settings, BY_HAND)
    await batch.start()
    current_task = asyncio.current_task()
    assert current_task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, current_task.cancel)
    try:
        task = TaskRegistry.get(name)
        refuse_other_pools(task, settings.pools)
        if task.pool in batch.child_pools.by_name:
            batch.child_pools.start_one(task.pool)
        manual = ManualRun(batch.ledger, batch.engine, task, batch.node.id)
        async with (
            watch.displayed(batch.operations, manual.id, display),
            _drained(batch, settings.DRAIN_SECONDS),
        ):
            row = await manual.execute(parameters, slot, requested_by=user())
        return RunNow.at({**row, "now": clock.now()}, clock.now())
    finally:
        await batch.stop()
        logging.flush()


@asynccontextmanager
async def _drained(batch: BatchService, seconds: float) -> AsyncIterator[None]:
    """If the block is cancelled, wait at most this many seconds for the end of the run, which is
    still displayed.
    """
    import asyncio

    from batch_system import logs

    try:
        yield
    except asyncio.CancelledError:
        if batch.engine.running:
            text = (
                f"stopping: if the run does not end within {seconds:g} s, it is interrupted, and a "
                "service resumes it"
            )
            logs.get_logger("batch_system.batch").info(text)
        await batch.drain()
        raise
