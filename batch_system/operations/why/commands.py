"""The commands that show more about a run, a task or an incident, or that change something about
it, the most useful one first. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Row

from batch_system.batch.ledger.states import FINAL, OF_RUNS, RunState
from batch_system.operations.why.results import Reason
from batch_system.words import short


def for_run(row: Mapping[str, Any], reasons: Sequence[Reason]) -> list[str]:
    """About a run. `row`: of the ledger. `reasons`: why it is as it is."""
    run, state = short(row["id"]), row["state"]
    kinds = {reason.kind for reason in reasons}
    if "quarantine" in kinds:
        return [f"batch quarantine {run}", f"batch redrive {run}", f"batch logs {run}"]
    if state == RunState.FAILED:
        return [f"batch logs {run}", f"batch retry {run}"]
    if "paused" in kinds:
        return [f"batch resume {row['task']}"]
    if "unserved" in kinds:
        return ["batch nodes", f"batch show {row['task']}"]
    if state in (RunState.SKIPPED, RunState.CANCELLED):
        return [*_blockers(reasons), f"batch retry {run}"]
    if state in FINAL:
        return [f"batch logs {run}"]
    return [*_blockers(reasons), f"batch show {run}"]


def _blockers(reasons: Sequence[Reason]) -> list[str]:
    """The commands that ask why the runs and tasks that are in the way are as they are."""
    named = [short(each.run) if each.run is not None else each.task for each in reasons]
    return list(dict.fromkeys(f"batch why {each}" for each in named if each is not None))


def for_task(name: str, opened: Sequence[Row[Any]], reasons: Sequence[Reason]) -> list[str]:
    """About a task. `opened`: its open incidents."""
    found = [
        f"batch why {short(each.newest_run)}" for each in opened if each.newest_run is not None
    ]
    if any(each.kind == "paused" for each in reasons):
        found.append(f"batch resume {name}")
    if any(each.kind == "unserved" for each in reasons):
        found.append("batch nodes")
    return [*dict.fromkeys(found), f"batch show {name}"]


def for_incident(row: Row[Any]) -> list[str]:
    """About an incident. `row`: of the ledger."""
    found = []
    if row.kind in OF_RUNS and row.newest_run is not None:
        found.append(f"batch logs {short(row.newest_run)}")
        if row.closed_at is None:
            found.append(f"batch retry --error {short(row.id)}")
    if row.closed_at is None and row.acknowledged_at is None:
        found.append(f"batch ack {short(row.id)} --note …")
    return found or ["batch incidents"]
