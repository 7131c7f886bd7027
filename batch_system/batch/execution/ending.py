"""How attempts end: whether the result is what the task expects, its JSON for the ledger, and the
log lines about it. In JSON these have the fields task, run, slot, attempt, duration and state.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic_core import to_json

from batch_system import escaping, failures
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.states import RunState
from batch_system.batch.tasks.declaration import expect_of
from batch_system.batch.tasks.registry import Task
from batch_system.concurrency.thread_pool import ThreadPool
from batch_system.logs import get_logger, log_lines
from batch_system.logs.log_lines import FIELDS

LARGEST_RESULT = 1_000_000
"""The largest size of a result as JSON, in bytes."""
LONGEST_BEGINNING = 1_000
"""How many characters of a larger result are kept."""
LONGEST_DESCRIPTION = 10_000
"""How many characters are kept of the repr of a result that is not JSON."""

_TEXTS, _CONTAINERS = (str, bytes), (dict, list, tuple, set, frozenset)

UNMET = "it has succeeded, but its result is not what the task expects"

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


async def why_unmet(task: Task, result: Any, threads: ThreadPool, patience: float) -> str | None:
    """Why the result of a run is not what the task expects; None if it is. `expect` is called where
    `run` was called: on the event loop or in a thread.

    `patience`: how many seconds a cancelled thread may take to end.
    """
    expect = expect_of(task.cls) if task.monitoring.expects else None
    if expect is None:
        return None
    try:
        if task.on_loop:
            is_met = bool(expect(result))
        else:
            is_met = await threads.run(lambda: bool(expect(result)), patience=patience)
    except (Exception, SystemExit) as error:  # noqa: BLE001
        # An author's function may raise anything.
        return f"{UNMET}: `expect` raised {failures.line_of(error)}"
    return None if is_met else UNMET


def result_as_json(result: Any) -> Any:
    """The result as JSON values. A result that can't be stored is described in a text instead,
    because the run has succeeded.
    """
    if result is None:
        return None
    try:
        if _is_large(result):
            return _beginning(json.dumps(log_lines.plain(result), ensure_ascii=False))
        encoded = to_json(result, inf_nan_mode="strings", fallback=repr)
        return (
            json.loads(encoded)
            if len(encoded) <= LARGEST_RESULT
            else _beginning(encoded.decode(errors="replace"))
        )
    except (Exception, SystemExit) as error:  # noqa: BLE001 - an author's object may raise anything
        type_name, text = type(result).__name__, escaping.echoed(result, LONGEST_DESCRIPTION)
        return (
            f"a result of type {type_name} that can't be kept as JSON ({failures.line_of(error)}): "
            f"{text}"
        )


def _is_large(result: Any) -> bool:
    """Whether the texts and containers in the result are too large to encode. Works without
    recursion.
    """
    bytes_left, unread = LARGEST_RESULT, [result]
    while unread:
        value = unread.pop()
        if isinstance(value, _TEXTS):
            bytes_left -= len(value)
        elif isinstance(value, _CONTAINERS):
            bytes_left -= 2 * len(value)
            if bytes_left >= 0:
                unread += value.values() if isinstance(value, dict) else value
        if bytes_left < 0:
            return True
    return False


def _beginning(encoded: str) -> str:
    logger.warning(f"the result has more than {LARGEST_RESULT:,} bytes; only its beginning is kept")
    return f"{encoded[:LONGEST_BEGINNING]}…"


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
