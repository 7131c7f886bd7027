"""`batch logs`."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated

import typer

from batch_system import escaping
from batch_system.cli.opening import ask
from batch_system.cli.options import RunOrTask

if TYPE_CHECKING:
    from batch_system.operations.asking.results import LogBlock


def logs(
    run: RunOrTask,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print new lines until the run has ended.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each line as a JSON object.")
    ] = False,
) -> None:
    """Show what a run has logged.

    RUN is the id of a run, at least 6 digits of its beginning or end, or the name of a task, which
    stands for its newest run. With --follow, the exit code is 0 if the run succeeded, and 1 if it
    did not.
    """
    from batch_system.verbs.following import log

    state = ask(
        lambda operations: print_log(log(operations, run, follow), as_json),
        needs_tasks=False,
    )
    raise SystemExit(1 if follow and state != "succeeded" else 0)


async def print_log(
    blocks: AsyncGenerator[LogBlock | str],
    as_json: bool = False,
    write: Callable[[str], None] = print,
) -> str:
    """Print the log lines in the blocks, and return the run's state, which is the last block.

    `write` is called with each line of text.
    """
    previous, state = (0, 1), ""
    async with aclosing(blocks) as opened:
        async for block in opened:
            if isinstance(block, str):
                state = block
                continue
            if as_json:
                _print_json(block)
            else:
                _print_text(block, previous, write)
            previous = block.fence, block.attempt
            sys.stdout.flush()
    return state


def _print_json(block: LogBlock) -> None:
    from batch_system import console

    for line in block.lines:
        console.show_json({**line.model_dump(), "attempt": block.attempt})


def _print_text(block: LogBlock, previous: tuple[int, int], write: Callable[[str], None]) -> None:
    """Print a block, with a heading if it is of another attempt or fence than the block before.

    `previous`: the fence and the attempt of the block before; (0, 1) for the first block.
    """
    from batch_system import console

    fence, attempt = previous
    if block.attempt != attempt:
        write(console.paint(f"--- attempt {block.attempt} ---", "heading"))
    elif fence and block.fence != fence:
        write(console.paint(f"--- attempt {block.attempt}, started again ---", "heading"))
    for line in block.lines:
        write(text(line.at, line.level, line.logger, line.text))


def text(at: str, level: str, logger: str, message: str) -> str:
    """A log line as text for a person. The message may consist of several lines."""
    from batch_system import console

    first_line, newline, other_lines = console.message(message).partition("\n")
    painted_level = console.paint(f"[{level:<8}]", level)
    return (
        f"{escaping.line(at)} {painted_level} {first_line} "
        f"[{escaping.line(logger)}]{newline}{other_lines}"
    )
