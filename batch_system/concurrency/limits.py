"""Limits: a block of code that waits for a database or another process ends at a time limit.

A cancel alone does not end such a wait: a connection whose other side acknowledges and forgets is
first rolled back, which also waits for an answer. So each connection registers how it can be cut
off, and at the limit it is cut off.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

Cut = Callable[[], None]

Block = tuple["asyncio.Task[Any] | None", dict[int, Cut]]

_blocks: ContextVar[tuple[Block, ...]] = ContextVar("batch_limits", default=())
"""The limited blocks around this code: the asyncio task of each, and for each thing that it holds,
by id, how to cut it off.
"""


class LimitReached(TimeoutError):
    """A limited block has waited for longer than its limit."""


@asynccontextmanager
async def limited(seconds: float) -> AsyncIterator[None]:
    """Let the block take at most this many seconds. At the limit, the things that it holds are cut
    off, and LimitReached is raised.
    """
    held: dict[int, Cut] = {}
    outer = _blocks.get()
    _blocks.set((*outer, (asyncio.current_task(), held)))
    timer = asyncio.get_running_loop().call_later(seconds, _cut_off, held)
    try:
        async with asyncio.timeout(seconds) as timeout:
            yield
    except TimeoutError as error:
        if timeout.expired():
            raise LimitReached(f"no answer within {seconds:g} s") from error
        raise
    finally:
        timer.cancel()
        # Not `reset`, which fails if a generator around the block is ended in another context.
        _blocks.set(outer)


def hold(thing: object, cut: Cut) -> None:
    """Call `cut` at the time limit of a limited block around this code. It must not raise.

    Tasks that were begun in the block, such as runs that a turn has started, are not limited by it.
    """
    if not (blocks := _blocks.get()):
        return
    task = asyncio.current_task()
    for owner, held in blocks:
        if owner is task:
            held[id(thing)] = cut


def release(thing: object) -> None:
    """Stop holding this thing: nothing waits for it any more."""
    for _, held in _blocks.get():
        held.pop(id(thing), None)


def _cut_off(held: dict[int, Cut]) -> None:
    for cut in list(held.values()):
        cut()
