"""`batch serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from service.cli.options import whole


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: HOST.")] = None,
    port: Annotated[
        int | None, typer.Option(parser=whole(0, 65535), metavar="NUMBER", help="Port to listen on; default: PORT.")
    ] = None,
    reload: Annotated[bool, typer.Option("--reload", help="Drain and start anew when a source file changes.")] = False,
) -> None:
    """Run the service: fire the tasks in TASKS_DIR and answer HTTP, until SIGTERM or Ctrl-C."""
    from service.config import get_settings
    from service.server import reload as reloading
    from service.server import uvicorn as server

    (reloading if reload else server).serve(get_settings(), host, port)
