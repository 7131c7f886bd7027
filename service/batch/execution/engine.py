"""What the dispatcher needs of an engine, which carries the runs that a node has claimed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from service.batch.ledger.runs import Claimed
from service.batch.queue.capacity import Capacity


class Engine(Protocol):
    """Executes the runs that its node claims. LocalEngine does so in this process."""

    claiming: asyncio.Lock
    """Held from the transaction that claims runs until `launch` has got them."""

    losses: int
    """How often the node has lost its lease."""

    @property
    def capacity(self) -> Capacity:
        """How many more runs the engine can take now."""

    def may_work(self) -> bool:
        """Whether the node holds its lease. While it does not, nothing may be claimed."""

    def launch(self, claimed: Sequence[Claimed], losses: int) -> None:
        """Start runs that the node has claimed. `losses`: the value of `losses` before it claimed them.

        Where the lease was lost since, another node may hold these runs, so their attempts end at once.
        """

    def wake(self) -> None:
        """Look for runs that may start now. Returns at once."""

    def recheck_claims(self) -> None:
        """Look into the ledger for runs that this node holds without knowing it.

        To be called after a transaction that failed: its COMMIT may have gone through without a reply.
        """
