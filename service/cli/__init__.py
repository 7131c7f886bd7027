"""`batch …`, also `python -m service`: parses, calls, prints.

A command imports what it needs when it runs, so that `batch --help` and a shell's completion answer at once.
"""

from __future__ import annotations

import sys

import typer
from typer.exceptions import TyperException

from service.cli import runs, serve, tasks
from service.errors import BatchError

cli = typer.Typer(
    name="batch",
    help="Batch System: tasks on schedule, every slot accounted for.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
cli.command()(serve.serve)
cli.command()(tasks.tasks)
cli.command()(runs.run)
cli.command()(runs.runs)
cli.command("next")(tasks.next_)


def main() -> None:
    """The entry point: what was wrong is said in one line on stderr, with exit code 2."""
    try:
        code = cli(standalone_mode=False)
    except TyperException as error:
        code = _refuse(error.format_message())
    except BatchError as error:
        code = _refuse(error.message)
    raise SystemExit(code)


def _refuse(message: str) -> int:
    if message:  # there is none where the help was shown instead
        print(f"batch: {message}", file=sys.stderr)
    return 2
