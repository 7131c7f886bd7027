"""Counts an attempt that has ended in the metrics: its outcome, and what it has done."""

from __future__ import annotations

from service.batch.execution.attempt import Attempt
from service.batch.ledger.attempts import Outcome
from service.metrics.process import ProcessMetrics


def ended(metrics: ProcessMetrics, attempt: Attempt, outcome: Outcome, is_recorded: bool) -> None:
    """Count an attempt that has ended. `is_recorded`: its outcome is in the ledger, and was not
    refused.
    """
    if is_recorded:
        seconds = (outcome.ended_at - outcome.started_at).total_seconds()
        goes_on = outcome.due_at is not None or outcome.split is not None
        state = None if goes_on else outcome.state.value
        metrics.count_attempt(outcome.task, outcome.outcome, seconds, state, attempt.claimed.origin)
    else:
        metrics.count_refused()
    forgotten(metrics, attempt)


def forgotten(metrics: ProcessMetrics, attempt: Attempt) -> None:
    """Count what an attempt has done that the engine forgets now, whether its outcome is in the
    ledger or not.
    """
    metrics.count_work(attempt.task.name, attempt.state.loops.done_here, attempt.state.log.dropped)
