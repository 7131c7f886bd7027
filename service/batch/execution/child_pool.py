"""The protocol of a pool that executes the bodies of attempts in processes of their own."""

from __future__ import annotations

from typing import Protocol

from service.batch.context.attempt_state import AttemptState
from service.batch.execution.body import Body
from service.batch.execution.ending import Ending
from service.batch.ledger.runs import Claimed
from service.batch.tasks.registry import Task


class PooledAttempt(Protocol):
    """What a pool needs of an attempt.

    `begins`: call it when the run is handed to its child; `child_begins`: once, when the child is
    about to call `run`.
    """

    claimed: Claimed
    task: Task
    state: AttemptState
    body: Body

    def begins(self) -> None: ...

    def child_begins(self) -> None: ...


class ChildPool(Protocol):
    """Executes bodies of attempts, one child process for each. `service/batch/pools` implements
    it.
    """

    @property
    def free(self) -> int:
        """How many more children may begin now."""

    async def execute(self, attempt: PooledAttempt) -> Ending:
        """Execute the body of the attempt in a child, and return how it ended.

        If it is cancelled, it asks the child to stop, and kills it when it goes on. When the child
        is gone, it returns what the child has told by then; if that is nothing, it raises
        CancelledError.
        """

    def kill(self, attempt: PooledAttempt) -> None:
        """Kill the child of the attempt now, if it has one. Returns at once; `execute` waits for
        the child's end.
        """
