"""The tabs of the list of runs: the states, with the number of runs under the other filters."""

from __future__ import annotations

from collections.abc import Mapping

from batch_system.batch.ledger import run_query
from batch_system.batch.ledger.run_query import Counts
from batch_system.batch.ledger.states import ACTIVE, RunState
from batch_system.pages.frame.formatting import number
from batch_system.pages.frame.shell import Tab
from batch_system.pages.runs.run_filter import address

ORDER = (
    RunState.FAILED,
    RunState.RUNNING,
    RunState.RETRYING,
    RunState.INTERRUPTED,
    RunState.QUEUED,
    RunState.WAITING,
    RunState.SUCCEEDED,
    RunState.SKIPPED,
    RunState.CANCELLED,
)


def tabs_of(given: Mapping[str, str], counts: Counts | None) -> list[Tab]:
    """All runs, those that are not over, and those of each state."""
    numbers = {"": shown(counts.all)} if counts is not None else {}
    if counts is not None and (by_state := counts.by_state) is not None:
        numbers |= {state: shown(by_state.get(state, 0)) for state in ORDER}
        numbers["active"] = shown(sum(by_state.get(state, 0) for state in ACTIVE))
    return [
        Tab(
            state.capitalize() or "All",
            address(given, state=state),
            numbers.get(state, ""),
            given.get("state", "") == state,
        )
        for state in ("", "active", *ORDER)
    ]


def others_of(given: Mapping[str, str], counts: Counts | None) -> Tab | None:
    """The tab of all runs, for a state that none is in; None if there are no others, or if that
    isn't known.
    """
    if "state" not in given or counts is None or counts.all == 0:
        return None
    return tabs_of(given, counts)[0]


def shown(count: int) -> str:
    """A number of runs that were counted up to COUNTED."""
    return number(count) if count <= run_query.COUNTED else f"{run_query.COUNTED:,}+"
