"""Lists of runs without those of some states or tasks."""

from __future__ import annotations

import pytest

from batch_system.batch.ledger.states import RunState
from batch_system.database.engine import Database
from batch_system.errors import InvalidParameters, UnknownPreview, WrongState
from batch_system.operations.asking.context import Loaded
from batch_system.operations.asking.filter import RunFilter
from batch_system.operations.bulks.bulk import carry_out
from batch_system.operations.operations import Operations
from batch_system.operations.runs.listing import count_states
from batch_system.settings.settings import Settings
from batch_system.verbs.bulks import BeginBulk, PreviewBulk, UndoBulk
from batch_system.verbs.runs import ListRuns
from tests.batch.ledger_world import know, make_task
from tests.incidents.watching import failed, retried, succeeded


@pytest.fixture
async def operations(ledger: Database) -> Operations:
    await failed(ledger, "load")
    await succeeded(ledger, "load")
    await succeeded(ledger, "report")
    await failed(ledger, "extract")
    return Operations(ledger, ledger, Loaded, Settings(), are_ready=True)


async def listed(operations: Operations, **conditions: list[str] | str) -> set[tuple[str, str]]:
    page = await operations(ListRuns.model_validate(conditions))
    return {(run.task, run.state) for run in page.runs}


async def test_runs_of_some_states_or_tasks_are_left_out(operations: Operations) -> None:
    assert await listed(operations, not_state=["succeeded"]) == {
        ("load", "failed"),
        ("extract", "failed"),
    }
    assert await listed(operations, exclude=["load", "extract"]) == {("report", "succeeded")}
    both = {"state": ["failed", "succeeded"], "not_state": ["failed"], "exclude": ["report"]}
    assert await listed(operations, **both) == {("load", "succeeded")}


async def test_a_filter_that_leaves_no_state_is_refused(operations: Operations) -> None:
    for given in ([RunState.FAILED], list(RunState)):
        with pytest.raises(InvalidParameters, match="they leave no state"):
            await operations(ListRuns(state=[RunState.FAILED], not_state=given))


async def test_named_runs_are_listed_and_a_retry_of_them_is_undone(operations: Operations) -> None:
    rows = (await operations(ListRuns(state=[RunState.FAILED]))).runs
    (load,) = [row.id for row in rows if row.task == "load"]
    assert await listed(operations, run=[load]) == {("load", "failed")}
    wanted = RunFilter(run=[load])
    retry = await operations(PreviewBulk(action="retry", filter=wanted))
    with pytest.raises(UnknownPreview, match="there is no bulk"):
        await operations(UndoBulk(preview=retry.id))
    await operations(BeginBulk(preview=retry.id))
    with pytest.raises(WrongState, match="goes on"):
        await operations(UndoBulk(preview=retry.id))
    await carry_out(operations.context, retry.id)
    assert await listed(operations, run=[load]) == {("load", "queued")}
    cancel = await operations(UndoBulk(preview=retry.id))
    assert (cancel.action, cancel.count) == ("cancel", 1)
    await operations(BeginBulk(preview=cancel.id))
    await carry_out(operations.context, cancel.id)
    assert await listed(operations, run=[load]) == {("load", "cancelled")}
    again = await operations(UndoBulk(preview=cancel.id))
    assert (again.action, again.count) == ("retry", 1)
    assert (await operations(UndoBulk(preview=retry.id))).count == 0


async def test_the_runs_of_an_error_are_found_although_one_was_retried(
    operations: Operations, ledger: Database
) -> None:
    await know(ledger, make_task("load"), make_task("report"))
    mended = await failed(ledger, "load", fingerprint="timed out")
    await retried(ledger, mended, RunState.SUCCEEDED, fingerprint=None)
    assert await listed(operations, task="load", fingerprint="timed out") == {("load", "succeeded")}
    assert await listed(operations, task="load", fingerprint="1:boom") == {("load", "failed")}
    assert await listed(operations, fingerprint="1:boom") == {
        ("load", "failed"),
        ("extract", "failed"),
    }
    assert await listed(operations, task="report", fingerprint="1:boom") == set()
    wanted = RunFilter(task="load", fingerprint="timed out")
    counts = await count_states(operations.context, wanted)
    assert counts is not None and counts.by_state == {"succeeded": 1}
    for wrong in ("1:BOOM", "x" * 41, "timed  out", ""):
        with pytest.raises(InvalidParameters, match="allowed is what `batch show` says"):
            RunFilter.of(fingerprint=wrong)
