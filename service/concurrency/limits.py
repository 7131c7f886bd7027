"""Limits: a block of code that waits for a database or another process ends when its time is over.

A cancel alone does not end such a wait: a connection whose other side acknowledges and forgets is
first rolled back, which waits for an answer as well. So what is waited for registers how it is cut
off, and at the limit it is.
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
"""The limited blocks around this code: the asyncio task of each, and how what it holds is cut off,
by its id.
"""


class LimitReached(TimeoutError):
    """What a limited block has waited for has not come in time."""


@asynccontextmanager
async def limited(seconds: float) -> AsyncIterator[None]:
    """Let the block take at most this many seconds. Then what it holds is cut off, and LimitReached
    is raised.
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
        # Not `reset`, which fails where a generator around the block is ended in another context.
        _blocks.set(outer)


def hold(thing: object, cut: Cut) -> None:
    """Have `cut` called when the time of a limited block around this code is over. It must not
    raise.

    Tasks that were begun in the block, such as runs that a turn has started, are not limited by it.
    """
    if not (blocks := _blocks.get()):
        return
    task = asyncio.current_task()
    for owner, held in blocks:
        if owner is task:
            held[id(thing)] = cut


def release(thing: object) -> None:
    """This is no longer waited for."""
    for _, held in _blocks.get():
        held.pop(id(thing), None)


def _cut_off(held: dict[int, Cut]) -> None:
    for cut in list(held.values()):
        cut()
