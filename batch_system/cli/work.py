"""`batch work`."""

from __future__ import annotations

from typing import Annotated

import typer

from batch_system.cli.opening import refuse_service
from batch_system.cli.options import whole
from batch_system.errors import InvalidParameters
from batch_system.escaping import echoed
from batch_system.settings.pools import POOL_NAME, POOL_NAME_ALLOWED


def work(
    pool: Annotated[
        list[str] | None,
        typer.Option(
            "--pool",
            metavar="NAME",
            help="A pool whose runs are executed here. Several times: several.",
        ),
    ] = None,
    max_running: Annotated[
        int | None,
        typer.Option(
            parser=whole(1, 100_000),
            metavar="NUMBER",
            help="How many runs at once, at most; default: the setting MAX_RUNNING.",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            parser=whole(0, 65535),
            metavar="NUMBER",
            help="Answer /healthz, /readyz and /metrics on this port. "
            "Without it no port is opened.",
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="With --port: the address to listen on; default: the setting HOST."),
    ] = None,
    ticket: Annotated[
        list[str] | None,
        typer.Option(
            "--ticket",
            metavar="TASK",
            help="Execute the runs of this task until there is none, and end. For placers.",
        ),
    ] = None,
    dask: Annotated[
        bool,
        typer.Option(
            "--dask", help="Run a Dask scheduler and its workers on this machine instead."
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            parser=whole(1, 1_000),
            metavar="NUMBER",
            help="With --dask: how many; default: one for each core.",
        ),
    ] = None,
) -> None:
    """Execute the runs of some pools on this machine until SIGTERM or Ctrl-C, beside the services
    on the same ledger.

    A worker fires nothing. It needs the files of the tasks in TASKS_DIR, and reaches the ledger and
    the application database of the service by DATABASE_URL and LEDGER_URL. A ledger on SQLite is
    for processes of one machine.
    """
    refuse_service("`batch work`")
    pools = frozenset(pool or ())
    for name in pools:
        if not POOL_NAME.fullmatch(name):
            raise InvalidParameters(f"--pool is {echoed(name)}; allowed: {POOL_NAME_ALLOWED}")
    if host is not None and port is None:
        raise InvalidParameters("--host needs --port; without --port, no port is opened")
    if workers is not None and not dask:
        raise InvalidParameters("--workers needs --dask")
    if (dask or ticket) and (port is not None or (dask and ticket)):
        raise InvalidParameters("--dask, --ticket and --port can't be combined")
    if not pools and not dask:
        raise InvalidParameters("--pool is missing: name the pools whose runs are executed here")
    from batch_system.settings.reading import get_settings

    settings = get_settings()
    if dask:
        from batch_system.server import local_dask

        local_dask.run(settings, pools, workers, max_running)
        return
    from batch_system.server import worker

    if max_running is not None:
        settings = settings.model_copy(update={"MAX_RUNNING": max_running})
    if ticket:
        worker.use_tickets(settings, pools, ticket)
    else:
        worker.work(settings, pools, host, port)
