"""The protocol of placers: what a service expects of the code that takes tickets to where the runs
of a pool execute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Needs:
    """What a ticket says about the runs that it is for.

    Attributes:
      pool: The pool of their task.
      memory: The `memory` of their task in bytes, if it names any.
      priority: That of the first of these runs. A ticket with a higher priority goes first.
      running: How many runs of the task are running. A ticket that was placed long ago either
          executes one of these or has not reached a node, which may never happen.
    """

    pool: str
    memory: int | None = None
    priority: int = 0
    running: int = 0


class Placer(Protocol):
    """Places tickets for one pool elsewhere. It may forget, repeat and reorder them.

    A ticket means: execute runs of this task, one after another, until no more can start. A ticket
    is taken to a node on tickets, which claims the runs, so a ticket that is lost or doubled does
    no harm.
    """

    async def places(self) -> int:
        """How many runs may execute there at once, as far as it knows. Return 0 if nothing there
        can be reached.
        """

    async def place(self, task: str, tickets: int, needs: Needs) -> None:
        """Make this many tickets of this task open, including those that execute runs now.

        It is called again with the current number when something has changed, and each second while
        runs of the task wait or are running. With 0, waiting tickets may be dropped.
        """

    async def close(self) -> None:
        """The service ends: release everything. It must not take longer than a second."""
