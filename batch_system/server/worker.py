"""`batch work`: a node that executes the runs of some pools, beside the services, and fires
nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from types import FrameType
from typing import Any

from batch_system import console, interrupts, logs
from batch_system.batch.nodes.roles import Roles
from batch_system.errors import DatabaseError
from batch_system.operations.system import nodes
from batch_system.server.service import BatchService
from batch_system.server.shutdown import serving
from batch_system.server.starting import (
    collect_garbage_less_often,
    collect_no_garbage_yet,
    print_summary,
    warnings_of_worker,
)
from batch_system.settings.settings import Settings
from batch_system.versions import missing

MOST_SECONDS = 86_400.0
"""A ticket of the command line ends when there is no run, or after this time."""
LOOK_SECONDS = 5.0
"""Seconds between two looks for the first service, while none is running."""


def work(
    settings: Settings, pools: frozenset[str], host: str | None = None, port: int | None = None
) -> None:
    """Execute runs of these pools until SIGTERM or SIGINT.

    `port`: serves health checks and metrics at the address `host` (by default the setting HOST);
    None opens no port. Raises BatchError if the worker can't start.
    """
    logs.set_up(settings.LOG_LEVEL, settings.LOG_FORMAT)
    collect_no_garbage_yet()
    if port is None:
        _work_without_port(settings, pools, ())
    else:
        _work_with_port(settings, pools, host, port)


def _work_without_port(settings: Settings, pools: frozenset[str], tasks: Sequence[str]) -> None:
    try:
        with interrupts.passed_to(signal.default_int_handler):
            asyncio.run(_until_cancelled(settings, pools, tasks))
    except KeyboardInterrupt:
        return
    except asyncio.CancelledError:  # SIGTERM: the process ends by the signal, as `batch serve` does
        logs.flush()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)


def use_tickets(settings: Settings, pools: frozenset[str], tasks: Sequence[str]) -> None:
    """Execute the runs of these tasks, for each task one after another, until there are none, and
    return.

    A task that is named twice has two runs at a time. SIGTERM and SIGINT drain. Raises BatchError
    if it can't start.
    """
    logs.set_up(settings.LOG_LEVEL, settings.LOG_FORMAT)
    _work_without_port(settings, pools, tasks)


async def _until_cancelled(settings: Settings, pools: frozenset[str], tasks: Sequence[str]) -> None:
    """Work until this asyncio task is cancelled, which both signals do; for SIGINT, asyncio.run()
    does it.
    """
    loop, work = asyncio.get_running_loop(), asyncio.current_task()
    assert work is not None

    def on_signal(_: int, __: FrameType | None) -> None:
        loop.call_soon_threadsafe(work.cancel)

    signal.signal(signal.SIGTERM, on_signal)
    async with serving(
        _new(settings, pools, on_tickets=bool(tasks)), settings, is_guest=False
    ) as batch:
        collect_garbage_less_often()
        if batch.tickets is not None:
            await asyncio.gather(*(batch.tickets.use(task, MOST_SECONDS) for task in tasks))
            return
        await _welcome(batch, "")
        await asyncio.Event().wait()


def _work_with_port(settings: Settings, pools: frozenset[str], host: str | None, port: int) -> None:
    try:
        from batch_system.server import uvicorn as server
        from batch_system.web import api
        from batch_system.web.access import check_settings
        from batch_system.web.application import Guarded
    except ModuleNotFoundError as error:
        raise missing("`batch work --port`", error) from None

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        try:
            async with serving(_new(settings, pools), settings, is_guest=False) as batch:
                app.state.batch = batch
                yield
        except BaseException as error:
            app.state.failure = error
            raise
        finally:
            logs.catch_up()

    async def welcome(batch: BatchService, url: str) -> None:
        await _welcome(batch, f" on {url}")

    check_settings(settings)
    with server.listen(settings, host, port) as listening:
        server.run(Guarded(routes=api.of_each_node, lifespan=lifespan), listening, welcome)


def _new(settings: Settings, pools: frozenset[str], on_tickets: bool = False) -> BatchService:
    return BatchService(settings, Roles(fires=False, pools=pools, on_tickets=on_tickets))


async def _welcome(batch: BatchService, where: str) -> None:
    print_summary(batch, where)
    for warning in warnings_of_worker(batch):
        console.warn(f"  {warning}")
    # The worker has started, so it goes on if the ledger can't be read now.
    with contextlib.suppress(DatabaseError):
        await warn_of_services(batch)


async def warn_of_services(batch: BatchService) -> None:
    """Warn if no service lives, until one does, or if one on another machine uses the same SQLite
    file.
    """
    services = await nodes.living(batch.operations.context)
    if not services:
        console.warn(
            "  no service is running: until one is, nothing fires, and the runs of lost nodes wait"
        )
        looking = asyncio.create_task(_say_when_a_service_runs(batch), name="batch-first-service")

        async def end() -> None:
            looking.cancel()
            await asyncio.wait([looking])

        batch.before_stop(end)
    others = {node.host for node in services} - {socket.gethostname()}
    if batch.ledger.kind == "sqlite" and others:
        console.warn(
            f"  the ledger is a file of SQLite, and a service on the host {min(others)} uses it: "
            "unless that is a "
            "container on this machine, the file will be damaged; processes of several machines "
            "need PostgreSQL"
        )


async def _say_when_a_service_runs(batch: BatchService) -> None:
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        with contextlib.suppress(DatabaseError):
            if services := await nodes.living(batch.operations.context):
                console.warn(f"  a service is running now, on the host {services[0].host}")
                return
