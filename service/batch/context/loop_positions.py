"""The loops and steps of one attempt: their names, what they owe, and how far they have come together."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine
from typing import Any, Protocol

from service.errors import ChunkError

NAME = re.compile(r"[^\s]{1,80}")


class Loop(Protocol):
    """What is asked of a loop here."""

    name: str

    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int | None: ...


class Loops:
    """Those of one attempt.

    Attributes:
        before: Items of them that earlier attempts did.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._unnamed = 0
        self._known: dict[str, tuple[int, int | None]] = {}
        """How far each loop is that has not ended, and its total."""
        self._done = self._total = self._without_total = 0
        """Of all, those too that have ended; the last: how many loops have no total."""
        self._unnamed_at: dict[str, int] = {}
        self._owed: dict[str, BaseException] = {}
        self._background: set[asyncio.Task[None]] = set()
        self.before = self._here = 0

    def name(self, kind: str, name: str | None) -> str:
        """The `name` of its row in batch_checkpoints: as given, or by its number in this attempt. Raises ChunkError."""
        if name is None:
            self._unnamed += 1
            name = str(self._unnamed)
        elif not NAME.fullmatch(name):
            raise ChunkError(f"name={name!r}; allowed: 1 to 80 characters without spaces")
        whole = f"{kind}:{name}"
        if whole in self._names:
            raise ChunkError(
                f"the name {name!r} is used twice in this run, and the second would find the place of the first: "
                "give each its own, such as name=f'orders-{shop.id}'"
            )
        self._names.add(whole)
        return whole

    def asked(self, loop: Loop) -> None:
        """For its next chunk. Raises ChunkError where a loop without a name began inside of its last one."""
        if self._unnamed_at.get(loop.name, self._unnamed) != self._unnamed:
            raise ChunkError(
                "a loop inside a loop needs a name of its own, made of what the outer one is at, such as "
                "name=f'orders-{shop.id}': by its number alone it could not be told from the others"
            )
        self._unnamed_at[loop.name] = self._unnamed
        self._owed.pop(loop.name, None)

    def owes(self, loop: Loop, error: BaseException) -> None:
        """Its last chunk was rolled back by `error`, and it will hand it out again when it is asked."""
        self._owed[loop.name] = error

    def committed(self, loop: Loop, number: int, items: list[Any]) -> None:
        """Its chunk. It may owe one no more: the beginning of a chunk is tried again inside the same `async with`."""
        self._owed.pop(loop.name, None)
        self._here += len(items)

    def raise_owed(self) -> None:
        """For the end of `run()`: a loop that was left, although its last chunk was not committed, has failed."""
        for error in self._owed.values():
            raise error

    def advanced(self, loop: Loop) -> tuple[int, int | None]:
        """Items done, and in all as far as that is known, by all loops of this attempt together."""
        self._add(self._known.get(loop.name), -1)
        self._known[loop.name] = loop.done, loop.total
        self._add(self._known[loop.name], 1)
        self.before = self._done - self._here
        return self._done, self._total if not self._without_total else None

    def _add(self, one: tuple[int, int | None] | None, sign: int) -> None:
        if one is not None:
            done, total = one
            self._done += sign * done
            self._total += sign * (total or 0)
            self._without_total += sign * (total is None)

    def ended(self, loop: Loop) -> None:
        """It hands out no more chunks. There may be thousands of them, one after another: nothing is kept of it."""
        self._known.pop(loop.name, None)
        self._unnamed_at.pop(loop.name, None)

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.Task(work, loop=asyncio.get_running_loop())  # no task factory: it is no part of the run's work
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def close(self) -> None:
        """The attempt is over."""
        for task in list(self._background):
            task.cancel()
