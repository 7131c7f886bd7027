"""The audit records starts, deploys, and changes of settings and schedules, each once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from batch_system import TaskRegistry, config
from batch_system.config import get_settings
from batch_system.operations.people.results import Change
from batch_system.server.service import BatchService
from batch_system.verbs.access import ListChanges
from batch_system.versions import application_version

TASK = """
from batch_system import BaseTask

class Report(BaseTask):
    name, schedule = "report", "{}"
    async def run(self): pass
"""


@pytest.fixture(autouse=True)
def place(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv(
        "LEDGER_URL",
        database_url if database_url.startswith("postgresql") else "sqlite:///ledger.db",
    )
    (tmp_path / "tasks" / "report.py").write_text(TASK.format("0 3 * * *"))


async def start(number: int = 1, **settings: str) -> Sequence[Change]:
    """Start so many services at once with these settings, stop them, and return all changes, the
    oldest first.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        config.forget_settings()
        services = [BatchService(get_settings(), version=None) for _ in range(number)]
        await asyncio.gather(*(service.start() for service in services))
        changes = (await services[0].operations(ListChanges(limit=200))).changes
        for service in services:
            await service.stop()
    return changes[::-1]


def of(changes: Sequence[Change], action: str) -> list[Any]:
    return [(change.before, change.after) for change in changes if change.action == action]


async def test_the_first_start_is_no_deploy() -> None:
    changes = await start(BATCH_VERSION="1")
    assert [change.action for change in changes] == ["service.start"]


async def test_another_version_is_one_deploy_although_several_processes_start_with_it() -> None:
    await start(BATCH_VERSION="1")
    changes = await start(3, BATCH_VERSION="2")
    [(before, after)] = of(changes, "service.deploy")
    assert (before["application"], after["application"]) == ("1", "2")
    assert of(await start(BATCH_VERSION="2"), "service.deploy") == [(before, after)]


async def test_a_changed_setting_is_told_with_both_values_and_a_secret_one_without() -> None:
    await start(BATCH_VERSION="1", KEEP_RUNS_DAYS="90", SENTRY_DSN="https://a@sentry.example/1")
    changes = await start(
        BATCH_VERSION="1", KEEP_RUNS_DAYS="30", SENTRY_DSN="https://b@sentry.example/1"
    )
    [(before, after)] = of(changes, "settings.change")
    assert before == {"KEEP_RUNS_DAYS": 90, "SENTRY_DSN": "***"}
    assert after == {"KEEP_RUNS_DAYS": 30, "SENTRY_DSN": "***"}
    assert "sentry.example" not in str(changes)
    again = await start(
        BATCH_VERSION="1", KEEP_RUNS_DAYS="30", SENTRY_DSN="https://b@sentry.example/1"
    )
    assert len(of(again, "settings.change")) == 1


async def test_a_changed_schedule_is_told_once(tmp_path: Path) -> None:
    await start()

    TaskRegistry.clear()
    (tmp_path / "tasks" / "later.py").write_text(TASK.format("0 4 * * *"))
    (tmp_path / "tasks" / "report.py").unlink()
    changes = await start(2)
    [(before, after)] = of(changes, "schedule.change")
    assert (before["cron"], after["cron"]) == ("0 3 * * *", "0 4 * * *")


def test_the_version_is_the_given_one_or_that_of_git_or_a_hash_of_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    assert application_version("7", folder, tmp_path) == "7"
    of_files = application_version(None, folder, tmp_path)
    assert of_files.startswith("tasks ")
    (folder / "report.py").write_text("x = 1")
    assert application_version(None, folder, tmp_path) != of_files
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text(f"# pack-refs\n{'a' * 40} refs/heads/main\n")
    assert application_version(None, folder, folder) == "a" * 12
    (git / "refs" / "heads" / "main").write_text(f"{'b' * 40}\n")
    assert application_version(None, folder, folder) == "b" * 12
    (git / "HEAD").write_text("ref: ../../etc/passwd\n")
    assert application_version(None, folder, folder).startswith("tasks ")
