"""A rolling deployment and the way back, in real processes: old, old and new, new, new and old,
old.

The two versions have another schedule and another overlap policy for a task, each has a task that
the other has not, and one is renamed. Both kinds of database at the same time; about 20 s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from batch_system.batch.ledger import tables
from batch_system.testing.databases import wait_for
from batch_system.testing.postgres import PostgresServer
from tests.outages import Case, until
from tests.processes import SERVE, Service, process

WAIT = 120.0
SECOND = timedelta(seconds=1)
KINDS = ("sqlite", "postgresql")
SETTINGS = {
    "POLL_SECONDS": "0.2",
    "HEARTBEAT_SECONDS": "0.5",
    "LEASE_SECONDS": "5",
    "DRAIN_SECONDS": "0.3",
}

TASKS = '''
import asyncio
import os

from batch_system import BaseTask, current_run

VERSION = "{version}"


def note(what):
    run = current_run()
    with open("witness", "ab", buffering=0) as file:
        file.write(f"{{what}}.{{VERSION}} {{run.task}} {{run.id}} {{run.fence}}\\n".encode())


class SharedTask(BaseTask):
    name, schedule = "shared", "{shared}"

    async def run(self):
        note("ran")


class PolicyTask(BaseTask):
    """Longer than the time between its slots."""

    name, schedule, overlap = "policy", "* * * * * *", "{overlap}"

    async def run(self):
        note("ran")
        await asyncio.sleep(1.2)


class OwnTask(BaseTask):
    """The other version has no such task; or it is this one under another name."""

    name, schedule = "only.{version}", "* * * * * *"

    async def run(self):
        note("ran")


class LongTask(BaseTask):
    """Too long for a drain, the first time."""

    name, schedule = "long.{version}", "* * * * * *"

    async def run(self):
        note("began")
        if not os.path.exists("begun.{version}"):
            open("begun.{version}", "w").close()
            await asyncio.Event().wait()
        note("ended")
'''
VERSIONS = {
    "old": {"version": "old", "shared": "* * * * * *", "overlap": "skip"},
    "new": {"version": "new", "shared": "*/2 * * * * *", "overlap": "allow"},
}


@dataclass
class Deployment:
    """The services on one ledger."""

    case: Case
    stack: ExitStack
    live: dict[str, Service] = field(default_factory=dict)

    def start(self, version: str) -> None:
        settings = {**self.case.settings, "TASKS_DIR": version}
        self.live[version] = self.stack.enter_context(process(self.case.folder, SERVE, settings))

    def stop(self, version: str) -> None:
        self.live.pop(version).stop(within=30)

    def ran(self, task: str, version: str) -> int:
        return len(self.case.witness(f"ran.{version}", task))

    def is_open(self, task: str) -> bool:
        return bool(self.case.rows(tables.schedules, task=task, valid_until=None))


@pytest.fixture(scope="module")
def deployments(
    tmp_path_factory: pytest.TempPathFactory, postgres_server: PostgresServer
) -> Iterator[dict[str, Deployment]]:
    with ExitStack() as stack:
        made = {
            kind: Deployment(make(kind, tmp_path_factory.mktemp("rolling"), postgres_server), stack)
            for kind in KINDS
        }
        both = list(made.values())
        start(both, "old")
        start(both, "new", beside="old")
        replace(both, "old")
        start(both, "old", beside="new")
        for version in ("new", "old"):
            for deployment in both:
                deployment.stop(version)
        yield made


def make(kind: str, folder: Path, server: PostgresServer) -> Case:
    application = (
        f"sqlite+aiosqlite:///{folder}/app.db"
        if kind == "sqlite"
        else wait_for(server.create_database())
    )
    ledger = f"sqlite+aiosqlite:///{folder}/ledger.db" if kind == "sqlite" else application
    case = Case(folder / "service", application, ledger, dict(SETTINGS), "")
    for version, words in VERSIONS.items():
        (case.folder / version).mkdir()
        (case.folder / version / "all.py").write_text(TASKS.format(**words))
    return case


def start(both: list[Deployment], version: str, beside: str | None = None) -> None:
    """Then all that a live node has runs a few times, and its long task has begun."""
    for deployment in both:
        deployment.start(version)
    for deployment in both:
        deployment.live[version].wait_until_ready()
    wanted = [(f"only.{one}", one) for one in (version, beside) if one is not None]
    before = {(id(d), task): d.ran(task, one) for d in both for task, one in wanted}
    for deployment in both:
        for task, one in wanted:
            enough = before[id(deployment), task] + 2
            until(
                lambda d=deployment, t=task, o=one, n=enough: d.ran(t, o) >= n, WAIT, f"{task} runs"
            )
        until(
            lambda d=deployment: d.case.witness(f"began.{version}", f"long.{version}"),
            WAIT,
            "the long task begins",
        )


def replace(both: list[Deployment], version: str) -> None:
    """Stop it, and wait until its own task counts as gone."""
    for deployment in both:
        deployment.stop(version)
    for deployment in both:
        until(
            lambda d=deployment: not d.is_open(f"only.{version}"), WAIT, f"only.{version} is closed"
        )


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, deployments: dict[str, Deployment]) -> Case:
    return deployments[request.param].case


def slots(case: Case, task: str) -> list[datetime]:
    return sorted(run["slot"] for run in case.rows(task=task))


def test_each_slot_is_accounted_for_once(case: Case) -> None:
    for task in ("shared", "policy", "only.old", "only.new", "long.old", "long.new"):
        ran = slots(case, task)
        assert len(ran) == len(set(ran)), task
        for each in case.rows(tables.missed, task=task):
            assert each["reason"] == "its file is gone"
            assert not [slot for slot in ran if each["first_slot"] <= slot <= each["last_slot"]], (
                task
            )
    assert all(account.is_complete for account in case.accounts()), case.accounts()


def test_no_node_runs_what_it_has_not_loaded_and_no_body_ran_twice(case: Case) -> None:
    for version, other in (("old", "new"), ("new", "old")):
        assert case.witness(f"ran.{version}", f"only.{other}") == []
        assert case.witness(f"began.{version}", f"long.{other}") == []
        assert case.witness(f"ran.{version}", f"only.{version}") != []
    for task in ("shared", "policy", "only.old", "only.new"):
        bodies = [*case.witness("ran.old", task), *case.witness("ran.new", task)]
        assert set(Counter(bodies).values()) == {1}
        succeeded = {run["id"] for run in case.rows(task=task, state="succeeded")}
        assert succeeded <= {run for run, _ in bodies}
        interrupted = {row["run"] for row in case.rows(tables.attempts, outcome="interrupted")}
        assert {
            run for run, number in Counter(run for run, _ in bodies).items() if number > 1
        } <= interrupted


def test_a_schedule_is_in_force_from_the_start_of_the_version_that_brings_it_and_for_all(
    case: Case,
) -> None:
    history = sorted(case.rows(tables.schedules, task="shared"), key=lambda row: row["valid_from"])
    assert [row["cron"] for row in history] == ["* * * * * *", "*/2 * * * * *", "* * * * * *"]
    assert [row["valid_until"] for row in history[:-1]] == [
        row["valid_from"] for row in history[1:]
    ]
    ran = slots(case, "shared")
    between = [slot for slot in ran if history[1]["valid_from"] < slot <= history[1]["valid_until"]]
    assert between
    assert {slot.second % 2 for slot in between} == {0}
    assert [slot for slot in ran if slot not in between and slot.second % 2 == 1]


def test_a_run_of_a_task_that_only_one_version_has_waits_until_that_is_back(case: Case) -> None:
    long = {
        version: case.witness(f"began.{version}", f"long.{version}")[0][0] for version in VERSIONS
    }
    (old,), (new,) = case.rows(id=long["old"]), case.rows(id=long["new"])
    assert (old["state"], old["attempt"], old["fence"]) == ("succeeded", 1, 2)
    assert (long["old"], 2) in case.witness("ended.old", "long.old")
    assert (new["state"], new["attempt"], new["fence"]) == ("interrupted", 1, 1)


def test_a_task_that_is_gone_and_comes_back_counts_from_then(case: Case) -> None:
    first, second = sorted(
        case.rows(tables.schedules, task="only.old"), key=lambda row: row["valid_from"]
    )
    assert first["valid_until"] <= second["valid_from"]
    accounted = slots(case, "only.old")
    missed = sum(row["count"] for row in case.rows(tables.missed, task="only.old"))
    spans = [(first["valid_from"], first["valid_until"]), (second["valid_from"], accounted[-1])]
    due = sum(int(end.timestamp()) - int(begin.timestamp()) for begin, end in spans)
    assert len(accounted) + missed == due
    assert case.rows(tables.tasks, name="only.old")[0]["removed_at"] is None
