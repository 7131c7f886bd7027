"""Upstream: what a run has waited for, with its results: slots of other tasks, and the members of
its group.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from batch_system.escaping import echoed


@dataclass(frozen=True)
class Done:
    """Something that a run has waited for: the slot of another task, or a member of its group.

    Attributes:
      task: The name of the task.
      run: The id of the run; None if the slot has none, because it was missed, for example.
      slot: The instant, aware, in UTC; None for a member without a slot, and for a task that had
          no slot yet.
      state: The state of the run when this one began; None without a run.
      params: The parameters with which its run was started, as JSON values and without defaults.
      part: The number of a part, from 1; None for another run.
      result: The value that its `run()` returned, as JSON values; None without a run, or if it
          returned nothing.
    """

    task: str
    run: str | None
    slot: datetime | None
    state: str | None
    params: Mapping[str, Any] = field(default_factory=dict, repr=False)
    result: Any = field(default=None, repr=False)
    part: int | None = None


ReadMembers = Callable[[str | None], Awaitable[Sequence[Done]]]
"""Returns the next members after the one with this id, or the first ones; an empty sequence at the
end.
"""


async def no_members(after: str | None) -> Sequence[Done]:
    """Used for a run that is no follow-up."""
    return ()


class Upstream(Mapping[str, Done]):
    """What a run has waited for, by the names of tasks. `async for done in upstream` yields the
    members of its group.

    A parameter of `run()` with this annotation receives it when an attempt begins. The members are
    read page by page, in the order of their ids, so that even a large group takes little memory.
    """

    def __init__(self, slots: Sequence[Done] = (), members: ReadMembers = no_members) -> None:
        self._slots = {done.task: done for done in slots}
        self._members = members

    def __getitem__(self, task: str) -> Done:
        try:
            return self._slots[task]
        except KeyError:
            there = (
                f"there is: {', '.join(self._slots)}"
                if self._slots
                else "it has waited for no slot"
            )
            raise KeyError(f"the run has not waited for a task {echoed(task)}; {there}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    async def __aiter__(self) -> AsyncIterator[Done]:
        """The members of the group whose follow-up this run is. Raises DatabaseError if the ledger
        can't be read.
        """
        after: str | None = None
        while page := await self._members(after):
            for done in page:
                yield done
            after = page[-1].run

    def __repr__(self) -> str:
        return f"Upstream({', '.join(self._slots)})"
