"""`batch demo`. Alone, because `batch` imports what a command needs only when it runs."""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from batch_system.cli.opening import refuse_service
from batch_system.cli.options import whole
from batch_system.versions import missing


def demo(
    folder: Annotated[
        Path | None,
        typer.Option(
            help="The folder for its files, which is missing or empty, or of an earlier "
            "demonstration; default: a temporary one."
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            parser=whole(0, 65535),
            metavar="NUMBER",
            help="The port to listen on; default: 8000.",
        ),
    ] = None,
) -> None:
    """Serve the pages with a made-up fortnight that ends in a bad night, until SIGTERM or Ctrl-C.

    It uses databases and tasks of its own. The page opens after some ten seconds; the days before
    the last night are filled in meanwhile.
    """
    from batch_system import console

    refuse_service("`batch demo`")
    try:
        from batch_system.demo import serving
    except ModuleNotFoundError as error:
        raise missing("`batch demo`", error) from None
    console.say("Making a fortnight that ends in a bad night …")
    # Otherwise the server ends the process by the signal, and the folder would stay.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="batch-demo-") as temporary:
        serving.show((folder or Path(temporary)).resolve(), port)
