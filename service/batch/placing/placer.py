"""The protocol of placers: what a service needs of whatever executes the runs of a pool
elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Needs:
    """What a ticket says about the runs that it is for.

    Attributes:
        pool: The pool of their task.
        memory: The `memory` of their task in bytes; None: it names none.
        priority: Of the first of these runs: a ticket with a higher one goes first.
        running: How many runs of the task are running. A ticket that was placed long ago either
            executes one of these or has not reached a node, which may never happen.
    """

    pool: str
    memory: int | None = None
    priority: int = 0
    running: int = 0


class Placer(Protocol):
    """Places tickets for one pool elsewhere. It may forget, repeat and reorder them.

    A ticket says: execute runs of this task, one after another, until none may start. Whoever gets
    one takes it to a node on tickets, which claims the runs, so a ticket that is lost or doubled
    does no harm.
    """

    async def places(self) -> int:
        """How many runs may execute there at once, as far as it knows. Return 0 where nobody is
        reached.
        """

    async def place(self, task: str, tickets: int, needs: Needs) -> None:
        """See to it that this many tickets of this task are open, with those that execute runs now.

        It is called again, with the number of that moment, each second while runs of the task wait
        or are running, and when something has changed. With 0, tickets that wait may be let go.
        """

    async def close(self) -> None:
        """The service ends: let everything go. It must not take longer than a second."""
