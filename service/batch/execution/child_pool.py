"""The protocol of a pool that executes the bodies of attempts in processes of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from service.batch.execution.ending import Ending

if TYPE_CHECKING:
    from service.batch.execution.attempt import Attempt


NO_CHILDREN: Mapping[str, ChildPool] = {}


def room_by_pool(pools: Iterable[str], child_pools: Mapping[str, ChildPool]) -> dict[str, int | None]:
    """For each pool how many more children may begin; None for a pool whose runs execute in this process."""
    return {name: child_pools[name].free if name in child_pools else None for name in pools}


class ChildPool(Protocol):
    """Executes bodies of attempts, one child process for each. `service/batch/pools` implements it."""

    @property
    def free(self) -> int:
        """How many more children may begin now."""

    async def execute(self, attempt: Attempt) -> Ending:
        """Execute the body of the attempt in a child, and return how it ended.

        If it is cancelled, it asks the child to stop, kills it when it goes on, and returns only when the child is
        gone: then it raises CancelledError.
        """
