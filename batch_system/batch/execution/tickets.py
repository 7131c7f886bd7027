"""Tickets: each allows this node to execute the runs of one task, one after another, until no more
can start.

A node on tickets claims nothing else. Each ticket has at most one run at a time. The claim decides
which run a ticket gets, if any, so a ticket that comes twice, late or in vain does no harm.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.queue import claiming
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.queue.turns import Turns
from batch_system.batch.tasks.registry import Task

PATIENCE_SECONDS = 5.0
"""How long a ticket waits while this node can't claim, because the ledger does not answer or the
lease is lost.
"""


@dataclass(eq=False)
class Ticket:
    """Permission to execute one run at a time. `until`: by the monotonic clock; after it the ticket
    claims no further run.

    `run`: the id of the run that it executes now. `has_looked`: whether it has tried to claim.
    """

    task: str
    until: float
    over: asyncio.Future[bool]
    run: str | None = None
    has_looked: bool = False

    def end(self, are_more: bool) -> None:
        if not self.over.done():
            self.over.set_result(are_more)


@dataclass
class Look:
    """The runs that one transaction has claimed, and the tickets for which it looked for runs.

    `are_more`: whether more runs may be claimable at once.
    """

    claimed: list[Claimed] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)
    are_more: bool = False


class Tickets:
    """The open tickets of one node. They belong to the event loop of the node's engine."""

    def __init__(self) -> None:
        self._open: list[Ticket] = []
        self._is_closed = False
        self._wake: Callable[[], None] = lambda: None
        self._turns = Turns()

    def attach(self, wake: Callable[[], None]) -> None:
        """`wake`: makes the engine claim."""
        self._wake = wake

    @property
    def are_free(self) -> bool:
        """Whether a ticket has no run yet."""
        return any(ticket.run is None for ticket in self._open)

    async def use(self, task: str, seconds: float) -> bool:
        """Execute runs of this task, one after another, until no more can start or `seconds` have
        passed.

        Returns whether more of them may be able to start. A run that has begun is always executed
        to its end.
        """
        if self._is_closed:
            return False
        loop = asyncio.get_running_loop()
        ticket = Ticket(task, clock.monotonic() + seconds, loop.create_future())
        patience = loop.call_later(seconds + PATIENCE_SECONDS, self._give_up, ticket)
        self._open.append(ticket)
        self._wake()
        try:
            return await ticket.over
        finally:
            patience.cancel()
            self._open.remove(ticket)

    def close(self) -> None:
        """End all tickets: those with a run when that run ends, the others now."""
        self._is_closed = True
        for ticket in self._open:
            self._give_up(ticket)

    def _give_up(self, ticket: Ticket) -> None:
        ticket.until = 0.0
        if ticket.run is None:
            ticket.end(False)

    async def take(
        self,
        connection: AsyncConnection,
        tasks: Mapping[str, Task],
        node: str,
        capacity: Capacity,
        ended: Collection[str],
        apart: bool = False,
    ) -> Look:
        """Claim a run for each ticket without one, and for each ticket whose run is among `ended`,
        which are ids.

        Tickets for which there is no room are left out. Claims take effect with `settle`. `apart`:
        as for `claiming.take`.
        """
        by_task: dict[str, list[Ticket]] = defaultdict(list)
        for ticket in self._open:
            is_free = ticket.run is None or ticket.run in ended
            if is_free and (not ticket.has_looked or clock.monotonic() < ticket.until):
                by_task[ticket.task].append(ticket)
        look = Look()
        for name, tickets in by_task.items():
            task = tasks.get(name)
            if task is not None and not capacity.has_room(task):
                continue
            look.tickets += tickets
            if task is not None:
                room = replace(
                    capacity, runs=min(capacity.runs, len(tickets)), pools=dict(capacity.pools)
                )
                claimed, _ = await claiming.take(
                    connection, {name: task}, node, room, apart, self._turns
                )
                capacity.runs -= len(claimed)
                capacity.threads, capacity.pools = room.threads, room.pools
                look.claimed += claimed
        return look

    def settle(self, look: Look, ended: Collection[str]) -> None:
        """Give the claimed runs to their tickets, and end the tickets that got none. Called after
        the commit.
        """
        claimed: dict[str, list[str]] = defaultdict(list)
        for run in look.claimed:
            claimed[run.task].append(run.id)
        for ticket in self._open:
            if ticket.run in ended:
                ticket.run = None
        for ticket in look.tickets:
            ticket.has_looked = True
            if ids := claimed[ticket.task]:
                ticket.run = ids.pop()
            else:
                ticket.end(False)
        for ticket in self._open:
            if ticket.run is None and ticket.has_looked and clock.monotonic() >= ticket.until:
                ticket.end(True)
