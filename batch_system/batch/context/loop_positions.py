"""The loops and steps of one attempt: their names, their rolled-back chunks, and their common
progress.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine
from typing import Any, Protocol

from batch_system.errors import ChunkError

NAME = re.compile(r"[^\s]{1,80}")


class Loop(Protocol):
    """A loop over chunks. `done`: items in committed chunks of all attempts. `total`: all items, if
    known.
    """

    name: str

    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int | None: ...


class Loops:
    """The loops and steps of one attempt.

    Attributes:
      before: How many items of these loops earlier attempts have done.
      done_here: How many items this attempt has done, in chunks that were committed.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._unnamed = 0
        self._progress: dict[str, tuple[int, int | None]] = {}
        """The items done and the total of each loop that has not ended, by its name."""
        self._done = self._total = self._without_total = 0
        """Sums over all loops, including ended ones: items done, totals, and loops with an unknown
        total.
        """
        self._unnamed_at: dict[str, int] = {}
        self._rolled_back: dict[str, BaseException] = {}
        self._background: set[asyncio.Task[None]] = set()
        self.before = self.done_here = 0

    def name(self, kind: str, name: str | None) -> str:
        """The `name` for the row of a loop or step in batch_checkpoints. None stands for its number
        in this attempt.

        `kind`: "chunks" or "step". Raises ChunkError if the name is not allowed, or is already
        used.
        """
        if name is None:
            self._unnamed += 1
            name = str(self._unnamed)
        elif not NAME.fullmatch(name):
            raise ChunkError(f"name={name!r}; allowed: 1 to 80 characters without spaces")
        key = f"{kind}:{name}"
        if key in self._names:
            raise ChunkError(
                f"the name {name!r} is used twice in this run, so the second would find the "
                "position of the first: "
                "give each its own, such as name=f'orders-{shop.id}'"
            )
        self._names.add(key)
        return key

    def before_chunk(self, loop: Loop) -> None:
        """Call it before a loop returns a chunk. Raises ChunkError if an unnamed loop began in its
        last chunk.
        """
        if self._unnamed_at.get(loop.name, self._unnamed) != self._unnamed:
            raise ChunkError(
                "a loop inside a loop needs a name of its own, made from the current item of the "
                "outer loop, such as name=f'orders-{shop.id}': its number alone could not tell "
                "it from the others"
            )
        self._unnamed_at[loop.name] = self._unnamed
        self._rolled_back.pop(loop.name, None)

    def rolled_back(self, loop: Loop, error: BaseException) -> None:
        """Record that `error` rolled back the last chunk of a loop, which will return it again."""
        self._rolled_back[loop.name] = error

    def committed(self, loop: Loop, number: int, items: list[Any]) -> None:
        """Record that a chunk was committed. It may have been rolled back before, and repeated in
        its `async with`.
        """
        self._rolled_back.pop(loop.name, None)
        self.done_here += len(items)

    def raise_rolled_back(self) -> None:
        """Call it at the end of `run()`: raises the error of a loop that was left after a chunk was
        rolled back.
        """
        for error in self._rolled_back.values():
            raise error

    def advanced(self, loop: Loop) -> tuple[int, int | None]:
        """Record the numbers of a loop. Returns the items done and the total of all loops; None if
        one of them is unknown.
        """
        self._add(self._progress.get(loop.name), -1)
        self._progress[loop.name] = loop.done, loop.total
        self._add(self._progress[loop.name], 1)
        self.before = self._done - self.done_here
        return self._done, self._total if not self._without_total else None

    def _add(self, progress: tuple[int, int | None] | None, sign: int) -> None:
        if progress is not None:
            done, total = progress
            self._done += sign * done
            self._total += sign * (total or 0)
            self._without_total += sign * (total is None)

    def ended(self, loop: Loop) -> None:
        """Forget a loop that returns no more chunks, except for its sums. A run may have thousands
        of loops.
        """
        self._progress.pop(loop.name, None)
        self._unnamed_at.pop(loop.name, None)

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Execute `work` beside the run, until the attempt ends."""
        # Bypasses a task factory of the application.
        task = asyncio.Task(work, loop=asyncio.get_running_loop())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def close(self) -> None:
        """Cancel the work in the background, because the attempt has ended."""
        for task in list(self._background):
            task.cancel()
