"""The protocol of a pool that executes the bodies of attempts in processes of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from service.batch.execution.ending import Ending

if TYPE_CHECKING:
    from service.batch.execution.attempt import Attempt


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
