"""The attempts of the runs that a node has claimed. Those of many runs are made before their claim
is committed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from service.batch.context.attempt_state import AttemptState
from service.batch.context.lease import LOST
from service.batch.execution import measuring
from service.batch.execution.attempt import Attempt
from service.batch.execution.child_pool import ChildPool
from service.batch.execution.ending import Ending, log_outcomes, log_refused
from service.batch.ledger.attempts import Outcome
from service.batch.ledger.runs import Claimed
from service.batch.ledger.states import RunState
from service.batch.tasks.registry import Task
from service.concurrency.thread_pool import ThreadPool
from service.metrics.process import ProcessMetrics


class ClaimedAttempts:
    """Makes the attempts of claimed runs, and keeps them until their outcomes are written.

    Attributes:
        by_run: The attempts that execute, or whose outcomes are not written yet, by the id of the
            run.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        threads: ThreadPool,
        on_end: Callable[[Attempt, Ending], None],
        take_over: Callable[[AttemptState], Awaitable[None]],
        holds_lease: Callable[[], bool],
        metrics: ProcessMetrics,
        child_pools: Mapping[str, ChildPool],
    ) -> None:
        """As for `Attempt`. `child_pools`: by name, those that execute in child processes."""
        self.by_run: dict[str, Attempt] = {}
        self._tasks = tasks
        self._child_pools = child_pools
        self._metrics = metrics
        self._given = (threads, on_end, take_over, holds_lease, metrics)
        self._ahead: dict[str, Attempt] = {}
        self._written: list[Outcome] = []
        self._refused: set[str] = set()
        self._written_events: dict[str, asyncio.Event] = {}

    def make_ahead(self, claimed: Sequence[Claimed]) -> None:
        """Make the attempts of runs whose claim is about to be committed. Those of an earlier claim
        are forgotten.
        """
        self._ahead = {run.id: self._made(run) for run in claimed}

    def start(self, run: Claimed, is_traced: bool) -> Attempt:
        """Start the attempt of a run that is claimed now. `is_traced`: whether this process records
        traces.
        """
        if (
            old := self.by_run.get(run.id)
        ) is not None:  # this node had lost the run, and has claimed it again
            old.give_up(LOST)
            measuring.forgotten(self._metrics, old)
        attempt = self._ahead.pop(run.id, None)
        # The run may have been lost, and claimed again.
        if attempt is None or attempt.claimed.fence != run.fence:
            attempt = self._made(run)
        self.by_run[run.id] = attempt
        attempt.start(is_traced)
        return attempt

    def are_written(self, outcomes: Sequence[Outcome], refused: Sequence[Outcome]) -> None:
        """These outcomes are in the ledger, except for those that were refused: `forget_written`
        forgets them all.
        """
        self._written += outcomes
        self._refused.update(outcome.id for outcome in refused)

    def forget_written(self, wake: Callable[[], None]) -> Sequence[Outcome]:
        """Forget the attempts whose outcomes were written since the last call, or refused, and log
        these outcomes.

        Returns them. `wake` is called when a run that is retried may start again.
        """
        outcomes = self._written
        self._written = []
        lost = self._refused
        self._refused = set()
        for outcome in outcomes:
            if not self._forget(outcome, is_refused=outcome.id in lost):
                continue
            if outcome.id in lost:
                log_refused(outcome)
            elif outcome.state == RunState.RETRYING and outcome.due_at is not None:
                wait = (outcome.due_at - outcome.ended_at).total_seconds()
                asyncio.get_running_loop().call_later(wait, wake)
        log_outcomes([outcome for outcome in outcomes if outcome.id not in lost])
        return outcomes

    def _forget(self, outcome: Outcome, is_refused: bool) -> bool:
        """Forget the attempt with this outcome. Returns whether it was known.

        It is not if an earlier write of the outcome had succeeded although it seemed to fail.
        """
        attempt = self.by_run.get(outcome.id)
        if attempt is None or attempt.claimed.fence != outcome.fence:
            return False
        del self.by_run[outcome.id]
        if (written := self._written_events.pop(outcome.id, None)) is not None:
            written.set()
        measuring.ended(self._metrics, attempt, outcome, is_recorded=not is_refused)
        return True

    async def until_written(self, run_id: str) -> None:
        """Wait until the outcome of the attempt of this run is written. Returns at once if there is
        none.
        """
        while run_id in self.by_run:
            await self._written_events.setdefault(run_id, asyncio.Event()).wait()

    def _made(self, run: Claimed) -> Attempt:
        task = self._tasks[run.task]
        return Attempt(run, task, *self._given, self._child_pools.get(task.pool))
