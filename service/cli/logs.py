"""`batch logs`."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated

import typer

from service import escaping
from service.cli.opening import ask
from service.cli.options import RunOrTask

if TYPE_CHECKING:
    from service.operations.results import LogBlock


def logs(
    run: RunOrTask,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each line as a JSON object.")] = False,
) -> None:
    """Show what a run has logged.

    RUN is a run's id, the first 6 or more digits of one, or a task's name: then its newest run is meant. With --follow
    the exit code is 0 when the run succeeded, and 1 when it ended otherwise.
    """
    state = ask(lambda operations: print_log(operations.runs.log(run, follow), as_json), needs_tasks=False)
    raise SystemExit(1 if follow and state != "succeeded" else 0)


async def print_log(
    blocks: AsyncGenerator[LogBlock | str], as_json: bool = False, write: Callable[[str], None] = print
) -> str:
    """Print the lines, and return the run's state."""
    before, state = (0, 1), ""
    async with aclosing(blocks) as opened:
        async for block in opened:
            if isinstance(block, str):
                state = block
                continue
            if as_json:
                _print_json(block)
            else:
                _print_text(block, before, write)
            before = block.fence, block.attempt
            sys.stdout.flush()
    return state


def _print_json(block: LogBlock) -> None:
    from service import console

    for line in block.lines:
        console.show_json({**line.model_dump(), "attempt": block.attempt})


def _print_text(block: LogBlock, before: tuple[int, int], write: Callable[[str], None]) -> None:
    """`before`: fence and attempt of the block before; of the first one, those that need no word."""
    from service import console

    fence, attempt = before
    if block.attempt != attempt:
        write(console.paint(f"--- attempt {block.attempt} ---", "heading"))
    elif fence and block.fence != fence:
        write(console.paint(f"--- attempt {block.attempt}, begun again ---", "heading"))
    for line in block.lines:
        write(text(line.at, line.level, line.logger, line.text))


def text(at: str, level: str, logger: str, message: str) -> str:
    """A line of a log as a person reads it; what it says may have lines of its own."""
    from service import console

    first, newline, more = console.message(message).partition("\n")
    shown = console.paint(f"[{level:<8}]", level)
    return f"{escaping.line(at)} {shown} {first} [{escaping.line(logger)}]{newline}{more}"
