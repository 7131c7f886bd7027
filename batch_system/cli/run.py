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
from batch_system.batch.ledger.states import StartPriority
from batch_system.cli import hints, progress, watch
from batch_system.cli.opening import ask, refuse_service
from batch_system.cli.options import AsJson, TaskName, instant, pairs, seconds, user, wait_for
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
    key: Annotated[
        str | None,
        typer.Option(
            help="With --queue: the same key starts a task once, or is merged, see below."
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(help="With --queue: when the run begins at the earliest (ISO 8601)."),
    ] = None,
    debounce: Annotated[
        float | None,
        typer.Option(
            parser=seconds,
            metavar="SECONDS",
            help="With --queue: starts with one key are one run, which begins when none has come "
            "for this time.",
        ),
    ] = None,
    at_most: Annotated[
        float | None,
        typer.Option(
            parser=seconds,
            metavar="SECONDS",
            help="With --debounce: the run is postponed by this at most. Default: 10 x debounce.",
        ),
    ] = None,
    once_in: Annotated[
        float | None,
        typer.Option(
            parser=seconds,
            metavar="SECONDS",
            help="With --queue: for this time after a start, those with its key make no run.",
        ),
    ] = None,
    priority: Annotated[
        StartPriority | None,
        typer.Option(help="With --queue: before or after the other runs of its queue."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="With --queue: show the log until the run ends.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a task now in this process, record the run, and show its log.

    The exit code is 1 if the run does not succeed. The command works whether a service is running
    or not. With --queue the task does not run in this process: a running service executes it, after
    the waiting runs of the task, or a worker of its pool does. With --debounce or --once-in, starts
    with the same --key, by default all of the task, become one run. With --json the run is printed
    as JSON, and its log goes to stderr.
    """
    of_slot = instant(slot, "--slot") if slot is not None else None
    asked: dict[str, Any] = {"note": note, "key": key, "at": at}
    asked |= {"debounce": debounce, "at_most": at_most, "once_in": once_in, "priority": priority}
    given = {option: value for option, value in asked.items() if value is not None}
    if queue:
        if at is not None:
            given["at"] = instant(at, "--at")
        _queue(
            {"name": name, "parameters": pairs(param or []), "slot": of_slot, **given},
            wait,
            as_json,
        )
    elif wait:
        raise InvalidParameters(
            "--wait needs --queue; without --queue, the command always waits for the run"
        )
    elif given:
        option = next(iter(given)).replace("_", "-")
        raise InvalidParameters(
            f"--{option} needs --queue: without it, the run begins at once in this process"
        )
    else:
        refuse_service("`batch run` without --queue")
        _execute(name, pairs(param or []), of_slot, as_json)


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


HOW = {
    "waits": "run {id} begins at {until} at the earliest",
    "merged": "merged with run {id}, which begins at {until} at the earliest",
    "dropped": "dropped: run {id} counts until {until}",
    "known": "run {id} has this key already",
}
"""What became of a start that has queued no run."""


def _queue(asked: dict[str, Any], wait: bool, as_json: bool) -> None:
    """`asked`: the fields of StartRun."""
    from batch_system import console
    from batch_system.verbs.run_changes import StartRun
    from batch_system.words import utc

    async def work(operations: Operations) -> tuple[Started, str | None]:
        started = await operations(StartRun(**asked))
        return started, await hints.hint_if_unserved(operations, asked["name"])

    started, hint = ask(work)
    if not as_json:
        begins_later = started.how == "created" and "debounce" in asked
        said = HOW.get("waits" if begins_later else started.how, "run {id} queued")
        until = utc(started.until) if started.until is not None else ""
        console.say(said.format(id=started.id, until=until), flush=True)
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
