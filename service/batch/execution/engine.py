"""The protocol of engines: what the dispatcher needs of the object that executes the runs of a
node.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from service.batch.ledger.runs import Claimed
from service.batch.queue.capacity import Capacity


class Engine(Protocol):
    """Executes the runs that its node claims. LocalEngine does so in this process."""

    claiming: asyncio.Lock
    """Held from the begin of a transaction that claims runs until `launch_all` has started them."""

    losses: int
    """How often this node has lost its lease."""

    @property
    def capacity(self) -> Capacity:
        """How many more runs the engine can execute now."""

    def may_work(self) -> bool:
        """Whether the node holds its lease. While it does not, the node may claim nothing."""

    def make_ready(self, claimed: Sequence[Claimed]) -> None:
        """Do what can be done of the launch of these runs before their claim is committed, and keep
        room for them.

        Without runs: the claim has failed, so what was done before is forgotten.
        """

    async def launch_all(self, claimed: Sequence[Claimed], losses: int) -> None:
        """Start runs that the node has claimed. `losses`: the value of `losses` before it claimed
        them.

        If the lease was lost in between, another node may hold these runs, so their attempts end at
        once.
        """

    def wake(self) -> None:
        """Look for runs that may start now. Returns at once."""

    def recheck_claims(self) -> None:
        """Have the ledger searched for runs that this node holds without knowing it. Returns at
        once.

        Call it after a claiming transaction has failed: its COMMIT may have succeeded although no
        reply came.
        """
