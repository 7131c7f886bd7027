"""How attempts end, and the log lines about it. In JSON they have the fields task, run, slot,
attempt, duration and state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.states import RunState
from batch_system.logs import get_logger
from batch_system.logs.log_lines import FIELDS

FEW = 20
"""Up to this number of outcomes, each is logged in a line of its own."""

logger = get_logger("batch_system.batch")


@dataclass(slots=True)
class Ending:
    """How an attempt ended: the next state of its run, and why.

    `outcome`: a word for the attempt's row, such as "timed out". `wait`: seconds until the next
    attempt; None if there is no retry. `fingerprint`: identifies what is wrong with the run; None
    if nothing is. `parts`: with the state WAITING, the parameters of the parts into which the run
    was split now; None if it was split before. `harm`: what the attempt may have done to its node.
    """

    state: RunState
    outcome: str
    reason: str | None = None
    result: Any = None
    error: BaseException | None = None
    wait: float | None = None
    fingerprint: str | None = None
    parts: Sequence[Mapping[str, Any]] | None = None
    harm: str | None = None
    harm_is_proven: bool = False


def log_ending(ending: Ending, claimed: Claimed, ended_at: datetime) -> None:
    """Log how an attempt ended that did not succeed. Called inside the run, so that its log gets
    the line.
    """
    seconds = (ended_at - claimed.attempt_started_at).total_seconds()
    ids = {"task": claimed.task, "run": claimed.id, "attempt": claimed.attempt}
    values = _json_only(ids, claimed.slot, seconds, ending.state)
    follows = (
        f"; attempt {claimed.attempt + 1} follows in {ending.wait:.1f} s"
        if ending.wait is not None
        else ""
    )
    if ending.error is not None:
        logger.error(
            f"{claimed.task} failed: {ending.reason}{follows}", exc_info=ending.error, **values
        )
    elif ending.state == RunState.WAITING:
        what = (
            f"split into {len(ending.parts):,} parts"
            if ending.parts is not None
            else "resumed with its parts"
        )
        logger.info(f"{claimed.task} was {what}", **values)
    else:
        logger.warning(f"{claimed.task} was {ending.outcome}: {ending.reason}", **values)


def log_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Log a line for each run that has succeeded; for more than FEW outcomes, one line with their
    numbers.

    An attempt that did not succeed has logged its own line.
    """
    if len(outcomes) > FEW:
        counts = Counter(outcome.outcome for outcome in outcomes)
        logger.info(", ".join(f"{number:,} runs {outcome}" for outcome, number in counts.items()))
        return
    for outcome in outcomes:
        if outcome.state == RunState.SUCCEEDED:
            seconds = (outcome.ended_at - outcome.started_at).total_seconds()
            ids = {"task": outcome.task, "run": outcome.id, "attempt": outcome.number}
            values = _json_only(ids, outcome.slot, seconds, outcome.state)
            logger.info(
                f"{outcome.task} {outcome.outcome} in {seconds:.2f} s", run=outcome.id, **values
            )


def log_refused(outcome: Outcome) -> None:
    """Log that an outcome was dropped, because another node holds the run."""
    logger.error(
        f"{outcome.task}: another node holds run {outcome.id}; its outcome here is not recorded"
    )


def _json_only(
    ids: dict[str, Any], slot: datetime | None, seconds: float, state: RunState
) -> dict[str, Any]:
    """The JSON fields of a line. `slot`: in UTC; a manual run may have none. `duration`: in
    seconds.
    """
    instant = slot.astimezone(UTC).isoformat().replace("+00:00", "Z") if slot is not None else None
    return {FIELDS: {**ids, "slot": instant, "duration": round(seconds, 3), "state": state.value}}
