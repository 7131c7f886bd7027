"""`batch work`."""

from __future__ import annotations

from typing import Annotated

import typer

from service.cli.opening import refuse_service
from service.cli.options import whole
from service.errors import InvalidParameters
from service.escaping import echoed
from service.poolsettings import POOL_NAME, POOL_NAME_ALLOWED


def work(
    pool: Annotated[
        list[str],
        typer.Option("--pool", metavar="NAME", help="A pool whose runs are executed here. Several times: several."),
    ],
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
            help="Answer /healthz, /readyz and /metrics on this port. Without it no port is opened.",
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="With --port: the address to listen on; default: the setting HOST.")
    ] = None,
) -> None:
    """Execute the runs of some pools on this machine until SIGTERM or Ctrl-C, beside the services on the same ledger.

    A worker fires nothing. It needs the files of the tasks in TASKS_DIR, and reaches the ledger and the application
    database of the service by DATABASE_URL and LEDGER_URL. A ledger on SQLite is for processes of one machine.
    """
    refuse_service("`batch work`")
    for name in pool:
        if not POOL_NAME.fullmatch(name):
            raise InvalidParameters(f"--pool is {echoed(name)}; allowed: {POOL_NAME_ALLOWED}")
    if host is not None and port is None:
        raise InvalidParameters("--host needs --port; without --port, no port is opened")
    from service.config import get_settings
    from service.server import worker

    settings = get_settings()
    if max_running is not None:
        settings = settings.model_copy(update={"MAX_RUNNING": max_running})
    worker.work(settings, frozenset(pool), host, port)
