"""Two versions side by side, in real processes and under load: the recorded wheel, and code that
migrates the ledger while nodes of the wheel work with it. About 25 s for each kind of database.
"""

from __future__ import annotations

import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename
from sqlalchemy import Column, Integer, MetaData, Table, Text

from batch_system.batch.ledger import tables
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.database.types import Id
from batch_system.testing.databases import wait_for
from batch_system.testing.postgres import PostgresServer
from tests.migrations import MIGRATION, oldest_in
from tests.outages import Case, until
from tests.processes import BATCH, ROOT, SERVE, Service, environment, process

WHEELS = Path(__file__).parent / "wheels"
PACKAGE = "batch_system"
NEXT_VERSION = "99.0"
WAIT = 60.0
SETTINGS = {
    "POLL_SECONDS": "0.2",
    "HEARTBEAT_SECONDS": "0.5",
    "LEASE_SECONDS": "10",
    "DRAIN_SECONDS": "3",
    "MAX_RUNNING": "20",
}
TASKS = """
import asyncio

from batch_system import BaseTask, Start, start_all


class TickTask(BaseTask):
    name, schedule, overlap = "tick", "* * * * * *", "allow"

    async def run(self):
        await asyncio.sleep(0.4)


class WorkTask(BaseTask):
    name, schedule, overlap = "work", None, "allow"

    async def run(self, number: int):
        await asyncio.sleep(0.3)


class FeedTask(BaseTask):
    name, schedule = "feed", "* * * * * *"

    async def run(self):
        await start_all([Start(WorkTask, number=number) for number in range(15)])
"""
TABLES = {
    '    Column("made_good_by", Id),\n': '    Column("later", Text),\n',
    '    Column("ledger", String(100)),\n': '    Column("later", Text, default="new"),\n',
}
"""What the next code knows of the tables, and what it follows: a column of `batch_runs`, and one
of `batch_nodes`.
"""
NODES = Table(
    "batch_nodes",
    MetaData(),
    Column("id", Id, primary_key=True),
    Column("pid", Integer),
    Column("version", Text),
)
"""What each version knows of the nodes."""
EXPANSION = """for table in ("batch_runs", "batch_nodes"):
        op.execute(f"ALTER TABLE {table} ADD COLUMN later TEXT")
    op.execute("CREATE INDEX ix_batch_runs_later ON batch_runs (later)")
    op.execute("CREATE TABLE batch_later (id INTEGER PRIMARY KEY)")"""


def recorded() -> Path:
    """The wheel of the last version."""
    return max(WHEELS.glob("*.whl"), key=lambda wheel: parse_wheel_filename(wheel.name)[1])


def unpacked(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder)
    return folder


def next_code(old: Path, folder: Path) -> Path:
    """The present code with one more migration of the ledger, as a version of its own."""
    shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / PACKAGE / "batch/ledger/tables.py"
    text = file.read_text()
    for known, more in TABLES.items():
        assert text.count(known) == 1
        text = text.replace(known, known + more)
    file.write_text(text)
    before = LEDGER_HISTORY.revisions[-1]
    migration = MIGRATION.format(
        revision="ledger_9000",
        before=before,
        oldest=oldest_in(LEDGER_HISTORY),
        statement=EXPANSION,
    )
    (folder / PACKAGE / "batch/ledger/migrations/versions/ledger_9000_later.py").write_text(
        migration
    )
    [facts] = old.glob("*.dist-info")
    version = facts.name.removesuffix(".dist-info").rpartition("-")[2]
    target = folder / facts.name.replace(version, NEXT_VERSION)
    shutil.copytree(facts, target)
    metadata = (target / "METADATA").read_text()
    (target / "METADATA").write_text(
        metadata.replace(f"\nVersion: {version}\n", f"\nVersion: {NEXT_VERSION}\n", 1)
    )
    return folder


class Versions:
    """Services of two versions on one ledger."""

    def __init__(self, case: Case, stack: ExitStack, code: dict[str, Path]) -> None:
        self.case = case
        self._stack = stack
        self._code = code

    def settings(self, version: str) -> dict[str, str]:
        return {**self.case.settings, "PYTHONPATH": str(self._code[version])}

    def start(self, version: str) -> Service:
        """A service that is ready, and has executed some runs."""
        service = self._stack.enter_context(
            process(self.case.folder, SERVE, env=environment(self.settings(version)))
        )
        service.wait_until_ready()
        [node] = self.case.rows(NODES, pid=service.process.pid)
        until(lambda: self.done_by(node["id"]) >= 5, WAIT, f"runs of the {version} node")
        return service

    def done_by(self, node: str) -> int:
        return len(self.case.rows(tables.attempts, node=node, outcome="succeeded"))

    def active(self, task: str) -> list[str]:
        """The states of the runs of a task that have not succeeded."""
        return [run["state"] for run in self.case.rows(task=task) if run["state"] != "succeeded"]

    def call(self, version: str, *words: str) -> tuple[int, str]:
        """`batch …` of a version, to its end: its exit code and output."""
        with process(
            self.case.folder, [*BATCH, *words], env=environment(self.settings(version))
        ) as command:
            command.process.wait(WAIT)
            return int(command.process.returncode or 0), command.stdout + command.stderr


@pytest.fixture(params=["sqlite", "postgresql"])
def versions(
    request: pytest.FixtureRequest, tmp_path: Path, postgres_server: PostgresServer
) -> Iterator[Versions]:
    old = unpacked(recorded(), tmp_path / "old")
    code = {"old": old, "next": next_code(old, tmp_path / "next")}
    if request.param == "sqlite":
        urls = [f"sqlite+aiosqlite:///{tmp_path}/{name}.db" for name in ("data", "runs")]
    else:
        urls = [wait_for(postgres_server.create_database())] * 2
    case = Case(tmp_path / "service", *urls, dict(SETTINGS), TASKS)
    with ExitStack() as stack:
        yield Versions(case, stack, code)


@pytest.mark.nightly
def test_a_newer_version_migrates_the_ledger_while_nodes_of_the_recorded_one_work_with_it(
    versions: Versions,
) -> None:
    first = versions.start("old")
    second = versions.start("old")
    code, said = versions.call("next", "migrate", "--check")
    assert (code, "may stay" in said) == (1, True), said
    newer = versions.start("next")  # migrates while the others work
    assert versions.call("old", "migrate", "--check")[0] == 0
    first.process.kill()
    first.process.wait()
    first = versions.start("old")  # on the newer ledger
    newer.process.kill()
    newer.process.wait()
    newer = versions.start("next")
    assert versions.call("old", "pause", "feed")[0] == 0
    until(lambda: not versions.active("work"), WAIT, "all that was started has ended")
    for service in (first, second, newer):
        assert "could not renew its lease" not in service.stderr
        assert "Traceback" not in service.stderr, service.stderr
        service.stop(within=30)
    each_slot_and_run_is_accounted_for(versions)


def each_slot_and_run_is_accounted_for(versions: Versions) -> None:
    case = versions.case
    for version in ("old", "next"):
        code, said = versions.call(version, "account", "--since", "1h")
        assert code == 0, said
    assert all(account.is_complete for account in case.accounts()), case.accounts()
    runs = {run["id"]: run for run in case.rows()}
    attempts = Counter(
        row["run"] for row in case.rows(tables.attempts) if row["outcome"] == "succeeded"
    )
    assert set(attempts.values()) == {1}
    assert set(attempts) == {id for id, run in runs.items() if run["state"] == "succeeded"}
    left = {run["state"] for run in runs.values() if run["task"] != "feed"}
    assert left <= {"succeeded", "interrupted"}
    assert len([run for run in runs.values() if run["task"] == "work"]) > 100
    versions_seen = {row["version"] for row in case.rows(NODES)}
    assert len(versions_seen) == 2 and NEXT_VERSION in versions_seen
