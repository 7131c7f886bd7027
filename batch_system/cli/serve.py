"""`batch serve`. Alone, because `batch` imports the module of a command only to run it or to show
its help.
"""

from __future__ import annotations

import gc
from typing import Annotated

import typer

from batch_system.cli.opening import refuse_service
from batch_system.cli.options import whole
from batch_system.versions import missing


def serve(
    host: Annotated[
        str | None, typer.Option(help="The address to listen on; default: the setting HOST.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            parser=whole(0, 65535),
            metavar="NUMBER",
            help="The port to listen on; default: the setting PORT.",
        ),
    ] = None,
    reload: Annotated[
        bool,
        typer.Option(
            "--reload", help="For development: restart when a source file or `.env` changes."
        ),
    ] = False,
) -> None:
    """Run the service, which fires the tasks in TASKS_DIR and answers HTTP requests, until SIGTERM
    or Ctrl-C.
    """
    refuse_service("`batch serve`")
    # Hardly any imported object is ever garbage, and the collector would check them all again and
    # again
    gc.disable()
    from batch_system.settings.reading import get_settings

    try:
        from batch_system.server import reload as reloading
        from batch_system.server import uvicorn as server
    except ModuleNotFoundError as error:
        raise missing("`batch serve`", error) from None

    gc.enable()  # the server freezes what is there now
    (reloading if reload else server).serve(get_settings(), host, port)
