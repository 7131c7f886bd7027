"""`batch quarantine` and `batch redrive`: from a run that set items aside to the one that does them
again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import Batch, in_this_process, refuses
from tests.processes import service

TASKS = """
from datetime import datetime
from pathlib import Path
from sqlalchemy import select
from batch_system import ItemTask, Skip, get_db
from service.application.models import User

class Greet(ItemTask):
    name, schedule = "greet", None
    skip = Skip(limit=9)
    def items(self, slot: datetime, first: int, greeting: str = "hello"):
        self.greeting = greeting
        return select(User).where(User.id >= first)
    async def save(self, user, fetched, db):
        if user.id % 2 == 0 and not Path("mended").exists():
            raise ValueError("even")
        user.email = f"{self.greeting}-{user.id}@greeted.invalid"

class Fill(ItemTask):
    name, schedule = "fill", None
    def items(self):
        return select(User)
    async def save(self, item, fetched, db): ...
    async def run(self) -> None:
        async with get_db() as db:
            db.add_all([User(email=str(number)) for number in range(5)])
            await db.commit()
"""


@pytest.fixture
def batch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    yield from in_this_process(capsys, monkeypatch)


def id_in(text: str) -> str:
    found = re.search(r"run ([0-9a-f-]{36})", text)
    assert found is not None, text
    return found[1]


def test_what_a_run_set_aside_is_listed_and_done_again(batch: Batch, tmp_path: Path) -> None:
    (tmp_path / "tasks/all.py").write_text(TASKS)
    assert batch("run", "fill").code == 0
    refuses(
        batch("run", "greet"),
        "first is required",
        "(it takes redrive, items, slot, first, greeting)",
    )
    first = batch(
        "run",
        "greet",
        "--param",
        "first=2",
        "--param",
        "greeting=hi",
        "--slot",
        "2026-03-01T00:00Z",
    )
    assert first.code == 0 and '{"done": 2, "set_aside": 2}' in first.out.replace(
        "\n", " "
    ).replace("  ", " ")
    run = id_in(first.out)
    listed = batch("quarantine", run)
    assert [line.split()[:3] for line in listed.out.splitlines()[1:]] == [
        ["2", "ValueError:", "even"],
        ["4", "ValueError:", "even"],
    ]
    found = batch("quarantine", run, "--json").json
    assert [one["item"] for one in found] == ["2", "4"] and "raise ValueError" in found[0]["error"][
        "traceback"
    ]
    everywhere = batch("quarantine")
    assert [line.split()[:3] for line in everywhere.out.splitlines()[1:]] == [
        [run[-8:], "greet", "4"],
        [run[-8:], "greet", "2"],
    ]
    assert {one["run"] for one in batch("quarantine", "--json").json} == {run}
    [listed_run] = [one for one in batch("runs", "--json").json if one["id"] == run]
    assert listed_run["quarantined"] == 2
    row = next(line for line in batch("runs").out.splitlines() if line.startswith(run[-8:]))
    assert re.split(r" {2,}", row)[-2] == "2"
    refuses(batch("redrive", run, "--item", "3"), "no such items set aside: 3")
    (tmp_path / "mended").touch()
    queued = batch("redrive", run, "--item", "4", "--note", "mended")
    assert [
        each["note"] for each in batch("changes", "--action", "run.redrive", "--json").json
    ] == ["mended"]
    assert (
        queued.code == 0
        and "of greet is queued" in queued.out
        and "no running service has the task greet" in queued.err
    )
    second = id_in(queued.out)
    with service(tmp_path, settings={"POLL_SECONDS": "0.2"}):
        assert batch("logs", second, "--follow").code == 0
        give_up_at = time.monotonic() + 20
        while not batch("incidents", "--json").json:
            assert time.monotonic() < give_up_at
        status = batch("status", "--json").json
        assert status["quarantined"] == 1, "the incident does not take the item out of the count"
        assert "greet: 1 item waits in quarantine" in [each["text"] for each in status["troubles"]]
    shown = batch("show", second, "--json").json
    assert (shown["parent"], shown["params"], shown["result"], shown["slot"]) == (
        run,
        {"redrive": run, "items": ["4"], "first": 2, "greeting": "hi"},
        {"done": 1, "set_aside": 0},
        "2026-03-01T00:00:00Z",
    )
    shown = batch("show", "greet", "--json").json
    assert [(one["name"], one["type"], one["required"]) for one in shown["parameters"]] == [
        ("redrive", "str | None", False),
        ("items", "list[str] | None", False),
        ("slot", "datetime.datetime", False),
        ("first", "int", True),
        ("greeting", "str", False),
    ]
    assert [one["redriven_by"] for one in batch("quarantine", run, "--json").json] == [None, second]
    assert [one["item"] for one in batch("quarantine", "--json").json] == ["2"]
    refuses(batch("redrive", run, "--item", "4"), f"processed since by run {second}")
    # The newest run of the task set nothing aside.
    assert batch("redrive", "greet", "--json").code == 2
    assert batch("redrive", run).code == 0
    refuses(batch("redrive", second), "has no such items set aside: none is left")
    assert batch("quarantine", second).err == "batch: no item of this run was set aside\n"
    assert "it is the newest run of the task" in batch("quarantine", "greet").err
    refuses(batch("quarantine", "01a2ffff"), "no run")
