"""The protocol of a pool that executes the bodies of attempts in child processes."""

from __future__ import annotations

from typing import Protocol

from batch_system.batch.context.attempt_state import AttemptState
from batch_system.batch.execution.body import Body
from batch_system.batch.execution.ending import Ending
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.tasks.registry import Task


class PooledAttempt(Protocol):
    """The part of an attempt that a pool uses.

    The pool calls `begins` when it hands the run to its child, and `child_begins` once, when the
    child is about to call `run`.
    """

    claimed: Claimed
    task: Task
    state: AttemptState
    body: Body

    def begins(self) -> None: ...

    def child_begins(self) -> None: ...


class ChildPool(Protocol):
    """Executes bodies of attempts, each in a child process of its own. `batch_system/batch/pools`
    implements it.
    """

    @property
    def free(self) -> int:
        """How many more children can start now."""

    async def execute(self, attempt: PooledAttempt) -> Ending:
        """Execute the body of the attempt in a child, and return how it ended.

        Cancelling this call asks the child to stop, and kills it if it does not. Once the child is
        gone, the call returns the ending that the child has reported, or raises CancelledError if
        there is none.
        """

    def kill(self, attempt: PooledAttempt) -> None:
        """Kill the child of the attempt now, if it has one. Returns at once; `execute` waits until
        the child has ended.
        """
