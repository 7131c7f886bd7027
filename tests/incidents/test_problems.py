"""One error is one problem: tasks that failed together with it are shown, sent and retried
together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from batch_system import clock
from batch_system.alerts.messages import message_of, problems_of
from batch_system.batch.incidents import problem as one_error
from batch_system.batch.ledger import tables
from batch_system.batch.ledger.incidents.tables import incidents, outbox
from batch_system.config import get_settings
from batch_system.database.engine import Database
from batch_system.operations.asking.context import Loaded
from batch_system.operations.bulks import retrying
from batch_system.operations.night import night
from batch_system.operations.operations import Operations
from batch_system.verbs.incidents import AcknowledgeIncident, ListIncidents, ShowIncident
from batch_system.verbs.night import ShowStatus
from batch_system.verbs.run_changes import AcknowledgeRun
from tests.batch.ledger_world import know, make_task, rows
from tests.commands import Batch, in_this_process
from tests.incidents.watching import Watching, ended, started, watching

START = datetime(2026, 3, 10, 2, tzinfo=UTC)
AWAY = "ConnectionRefusedError: [Errno 111] Connect call failed ('127.0.0.1', 5432)"
FLEET = [f"fleet{number:02}" for number in range(12)]


def facts(task: str, line: int = 7) -> dict[str, str]:
    """The error of a task whose code is in a file of its own. Only the innermost frame is the same
    for all tasks.
    """
    frames = (
        f'  File "/app/tasks/{task}.py", line {line}, in run\n  File "/lib/asyncpg/connect.py", '
        "line 99, in _connect\n"
    )
    text = AWAY.partition(": ")[2]
    return {
        "type": "ConnectionRefusedError",
        "message": f"{text}\nmore",
        "traceback": f"Traceback:\n{frames}{AWAY}",
    }


@pytest.fixture
async def watch(ledger: Database) -> AsyncIterator[Watching]:
    with clock.moved(START):
        async with watching(ledger, ledger) as node:
            await know(ledger, *(make_task(name, None, owner="data team") for name in FLEET))
            yield node


@pytest.fixture
def operations(ledger: Database) -> Operations:
    return Operations(ledger, ledger, lambda: Loaded({}, []), get_settings(), are_ready=True)


@pytest.fixture
def batch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    yield from in_this_process(capsys, monkeypatch)


async def fail(watch: Watching, *names: str) -> None:
    """Each of these tasks fails with the error, and the watch notices it."""
    for name in names:
        run = await started(watch.ledger, name)
        await ended(watch.ledger, run, fingerprint=f"1:{name}", reason=AWAY, error=facts(name))
    await watch.turn(3)


async def test_tasks_that_fail_together_with_one_error_are_one_row_and_one_message(
    watch: Watching, operations: Operations
) -> None:
    other = await started(watch.ledger, "fleet00")
    await ended(
        watch.ledger, other, reason="ValueError: no", error={"type": "ValueError", "message": "no"}
    )
    await fail(watch, *FLEET)
    watch.later(700)
    await fail(watch, *FLEET[:4])  # too few for one problem, and the same incidents as before
    assert len(await watch.incidents(kind="failed")) == 13
    found = await night.night(operations.context)
    (one, alone) = sorted(
        (need for need in found.needs if need.kind == "failed"), key=lambda need: -len(need.tasks)
    )
    assert (one.task, one.subject, one.tasks, one.open) == (None, "12 tasks", FLEET, 16)
    assert (one.owner, one.error, len(one.incidents)) == ("data team", AWAY, 12)
    assert (alone.task, alone.tasks) == ("fleet00", ())
    status = await operations(ShowStatus())
    assert f"12 tasks failed with one error: {AWAY}" in [
        trouble.text for trouble in status.troubles
    ]
    notes = [(row["kind"], row["content"]) for row in await rows(watch.ledger, outbox)]
    made = message_of("m", notes[1:], lambda content: f"https://batch/{content['id']}", {})
    assert made.title.startswith(
        "12 tasks failed with one error: ConnectionRefusedError: [Errno 111]"
    )
    first = notes[1][1]["id"]
    assert made.body.splitlines()[1:] == [
        "12 runs from 2026-03-10 02:00 UTC to 2026-03-10 02:00 UTC.",
        f"Tasks: {', '.join(FLEET[:10])} and 2 more",
        "Owners: data team",
        f"When it is mended: batch retry --error {first}",
        f"https://batch/{first}",
    ]
    assert message_of("m", notes, lambda _: None, {}).title == "2 incidents: fleet00, 12 tasks"
    told = await rows(watch.ledger, outbox)
    problems = [problem for _, problem in problems_of([_Row(row) for row in told])]
    assert [problem and problem["tasks"] for problem in problems] == [None, *[12] * 12]


class _Row:
    def __init__(self, values: Any) -> None:
        self.kind, self.content = values["kind"], values["content"]


async def test_incidents_night_and_status_say_one_number_of_open_runs(
    watch: Watching, operations: Operations
) -> None:
    await fail(watch, *["fleet00"] * 3)
    failed = (await rows(watch.ledger, tables.runs))[0]["id"]
    await operations(AcknowledgeRun(run=failed, note="the test"))
    (incident,) = (await operations(ListIncidents())).incidents
    assert (
        incident.count,
        incident.open,
        (await operations(ShowIncident(incident=incident.id))).open,
    ) == (
        3,
        2,
        2,
    )
    assert [
        need.open
        for need in (await night.night(operations.context)).needs
        if need.task == "fleet00"
    ] == [2]
    assert f"fleet00: 2 runs failed: {AWAY}" in [
        trouble.text for trouble in (await operations(ShowStatus())).troubles
    ]
    await operations(AcknowledgeIncident(incident=incident.id, note="the test"))
    assert [each.open for each in (await operations(ListIncidents(state="closed"))).incidents] == [
        None
    ]


@pytest.mark.rest
async def test_one_command_retries_or_acknowledges_the_runs_of_one_error(
    watch: Watching, batch: Batch, ledger_url: str, database_url: str
) -> None:
    async def call(*words: str) -> Any:
        return await asyncio.to_thread(
            batch, *words, LEDGER_URL=ledger_url, DATABASE_URL=database_url
        )

    other = await started(watch.ledger, "fleet00")
    await ended(
        watch.ledger, other, reason="ValueError: no", error={"type": "ValueError", "message": "no"}
    )
    await fail(watch, *FLEET)
    listed = (await call("incidents")).out
    assert "12 tasks" in listed and listed.count("fleet") == 1
    incident = (await watch.incidents(task="fleet03"))[0]["id"]
    done = await call("retry", "--error", incident, "--yes")
    assert "12 runs are queued again" in done.out
    assert "1 of fleet00, 1 of fleet01" in done.out or "1 of fleet11, 1 of fleet10" in done.out, (
        "how many of each task"
    )
    states = {run["state"] for run in await rows(watch.ledger) if run["id"] != other.id}
    assert states == {"queued"}
    assert (await rows(watch.ledger, id=other.id))[0]["state"] == "failed"
    done = await call("ack", "--error", incident, "--note", "the database is moved")
    assert (
        done.out == "12 incidents are acknowledged by ann, with 0 failed runs\n"
        or "12 incidents are" in done.out
    )
    left = [
        row["task"]
        for row in await watch.incidents(closed_at=None)
        if row["acknowledged_at"] is None
    ]
    assert left == ["fleet00"]


async def test_one_error_of_more_than_a_thousand_tasks_is_retried_at_once(
    watch: Watching, operations: Operations
) -> None:
    await fail(watch, "fleet00")
    (row,) = await watch.incidents(kind="failed")
    others = [{**row, "id": tables.new_id(), "task": f"other{number}"} for number in range(1_100)]
    async with watch.ledger.engine.begin() as connection:
        await connection.execute(incidents.insert(), others)
    plan = await retrying.plan_retry(operations.context, row["id"], with_same_error=True)
    assert (plan.task, plan.preview.count) == ("1,101 tasks", 1)


def test_a_group_has_five_members_within_ten_minutes() -> None:
    def at(minutes: float) -> tuple[str, datetime]:
        return "key", START + timedelta(minutes=minutes)

    items = [at(0), at(11), at(12), at(13), at(14), ("other", START), at(15), at(21.1)]
    together = one_error.groups(items, lambda item: item)
    assert together == [
        [at(0)],
        [at(11), at(12), at(13), at(14), at(15)],
        [("other", START)],
        [at(21.1)],
    ]
    assert one_error.groups(items[:5], lambda item: item) == [[item] for item in items[:5]]
    assert one_error.key_of(facts("a", 1)) == one_error.key_of(facts("b", 2))
    assert one_error.key_of(facts("a")) != one_error.key_of({**facts("a"), "type": "OSError"})
