"""`batch cancel` and `batch retry` of all runs that match a filter, and of a run that is given by
its task.
"""

from __future__ import annotations

import asyncio
import io
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from batch_system import clock
from batch_system.batch.ledger.tables import runs
from batch_system.database.engine import Database
from batch_system.operations.bulks.results import Bulk
from tests.batch.ledger_world import know, make_task, rows
from tests.batch.test_runs import insert, new
from tests.commands import Batch, in_this_process, refuses
from tests.processes import service


@pytest.fixture
def batch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    monkeypatch.setenv("LOGNAME", "ann")
    yield from in_this_process(capsys, monkeypatch)


@pytest.fixture
async def failures(ledger: Database) -> list[str]:
    """The ids of three failed runs of `import`, the newest first. `report` has a failed and a
    queued one.
    """
    now = clock.now()
    await know(ledger, make_task("import"), make_task("report"))
    ended = {"state": "failed", "exclusive": None, "finished_at": now}
    made = [
        new("import", created_at=now - timedelta(minutes=minutes), **ended) for minutes in range(3)
    ]
    await insert(
        ledger, *made, new("report", **ended, created_at=now), new("report", created_at=now)
    )
    return [run.id for run in made]


async def states(ledger: Database) -> Counter[tuple[str, str]]:
    return Counter((row["task"], row["state"]) for row in await rows(ledger))


BEFORE = Counter({("import", "failed"): 3, ("report", "failed"): 1, ("report", "queued"): 1})


@pytest.fixture
def call(batch: Batch, ledger_url: str) -> Any:
    async def call(*words: str) -> Any:
        return await asyncio.to_thread(batch, *words, LEDGER_URL=ledger_url)

    return call


async def test_a_retry_of_many_shows_which_and_with_yes_queues_them(
    ledger: Database, failures: list[str], call: Any
) -> None:
    done = await call("retry", "--task", "import", "--state", "failed", "--yes")
    assert done.code == 0, done
    head, newest, oldest, told = done.out.splitlines()
    assert (head, told) == ("retry 3 runs:", "3 runs are queued again")
    assert newest.split()[2] == failures[0][-8:] and oldest.split()[2] == failures[2][-8:]
    assert "no service is running" in done.err
    assert await states(ledger) == BEFORE - Counter({("import", "failed"): 3}) + Counter(
        {("import", "queued"): 3}
    )
    changes = (await call("changes", "--json")).json
    assert [(each["action"], each["actor"]) for each in changes] == [("bulk.retry", "ann")]


async def test_a_cancel_of_many_takes_the_active_ones(
    ledger: Database, failures: list[str], call: Any
) -> None:
    done = await call("cancel", "--since", "1h", "--yes", "--json")
    assert done.code == 0 and list(done.json) == list(Bulk.model_fields)
    assert (done.json["count"], done.json["changed"]) == (1, 1)
    assert (await states(ledger))["report", "cancelled"] == 1


@pytest.fixture
async def open_failures(ledger: Database, failures: list[str]) -> list[str]:
    """Those of `import`, as a process writes them that has a failed attempt."""
    async with ledger.engine.begin() as connection:
        await connection.execute(
            update(runs).where(runs.c.state == "failed").values(fingerprint="1:boom")
        )
    return failures


async def test_failed_runs_are_acknowledged_one_or_many_at_a_time(
    ledger: Database, open_failures: list[str], call: Any
) -> None:
    one = await call("ack", "--run", open_failures[0], "--note", "known")
    assert (one.code, one.out) == (
        0,
        f"the failed run {open_failures[0]} of import is acknowledged\n",
    ), one
    many = await call("ack", "--task", "import", "--note", "the source is down", "--yes")
    assert many.code == 0, many
    assert (many.out.splitlines()[0], many.out.splitlines()[-1]) == (
        "acknowledge 3 runs:",
        "2 runs are acknowledged; 1 run had another state by then",
    )
    marked = {row["id"] for row in await rows(ledger) if row["acknowledged"]}
    assert marked == set(open_failures)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ((), "name an INCIDENT, or select failed runs by an option"),
        (("0f4693de", "--task", "import"), "give INCIDENT, or --run, or --error, or options"),
        (("0f4693de", "--run", "import"), "give INCIDENT, or --run, or --error, or options"),
        (("--task", "import", "--quiet", "2h"), "--quiet needs INCIDENT"),
        (("--task", "import", "--text", "boom"), "--param and --text need --task"),
    ],
)
async def test_an_acknowledgement_of_nothing_is_refused(
    call: Any, words: tuple[str, ...], problem: str
) -> None:
    refuses(await call("ack", *words, "--note", "known"), problem)


@pytest.mark.parametrize(
    ("typed", "code"), [("y\n", 0), ("yes\n", 0), ("n\n", 2), ("\n", 2), ("", 2)]
)
async def test_a_person_is_asked(
    ledger: Database,
    failures: list[str],
    call: Any,
    monkeypatch: pytest.MonkeyPatch,
    typed: str,
    code: int,
) -> None:
    stdin = io.StringIO(typed)
    monkeypatch.setattr(stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", stdin)
    done = await call("retry", "--task", "import")
    assert (done.code, "Retry 3 runs? [y/N]" in done.err) == (code, True)
    assert (await states(ledger) == BEFORE) == (code == 2)


async def test_where_nobody_can_be_asked_nothing_is_changed_without_yes(
    ledger: Database, failures: list[str], call: Any
) -> None:
    done = await call("retry", "--task", "import", "--json")
    refuses(done, "nothing was changed", "stdin is no terminal, so --yes is needed")
    assert await states(ledger) == BEFORE


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("retry", ["name a RUN, or select runs by an option: --task"]),
        ("cancel --yes", ["name a RUN"]),
        ("retry import --state failed", ["RUN names one run"]),
        ("retry --again --task import", ["--again needs RUN"]),
        (
            "retry --state queued --task report",
            ["queued", "retry", "allowed: cancelled, failed, skipped"],
        ),
        ("cancel --state failed --task report", ["failed", "cancel", "queued"]),
        ("cancel --task reprt", ["'reprt'", "did you mean report?"]),
    ],
)
async def test_what_is_not_clear_is_refused(
    ledger: Database, failures: list[str], call: Any, words: str, named: list[str]
) -> None:
    refuses(await call(*words.split()), *named)
    assert await states(ledger) == BEFORE


async def test_if_no_run_matches_that_is_said_and_nobody_is_asked(
    failures: list[str], call: Any
) -> None:
    done = await call("retry", "--state", "skipped", "--task", "import")
    assert (done.code, done.out, done.err) == (0, "", "batch: no runs match\n")
    assert (await call("retry", "--state", "skipped", "--task", "import", "--json")).json[
        "count"
    ] == 0


async def test_more_than_one_transaction_of_runs_is_changed(ledger: Database, call: Any) -> None:
    await know(ledger, make_task("import"))
    at = clock.now()
    await insert(
        ledger,
        *(new("import", state="failed", exclusive=None, created_at=at) for _ in range(2_500)),
    )
    done = await call("retry", "--state", "failed", "--yes")
    assert (done.code, done.out.splitlines()[-1]) == (0, "2,500 runs are queued again")
    assert await states(ledger) == Counter({("import", "queued"): 2_500})


TASK = """
from batch_system import BaseTask

class Import(BaseTask):
    name, schedule, overlap = "import", None, "allow"
    async def run(self): ...
"""


async def test_beside_a_service_each_run_is_changed_once_and_executed(
    ledger: Database, ledger_url: str, call: Any, tmp_path: Path
) -> None:
    (tmp_path / "tasks/all.py").write_text(TASK)
    await know(ledger, make_task("import", None))
    at = clock.now()
    await insert(
        ledger,
        *(new("import", state="failed", exclusive=None, created_at=at) for _ in range(1_200)),
    )

    def work() -> Any:
        with service(tmp_path, settings={"LEDGER_URL": ledger_url, "POLL_SECONDS": "0.1"}):
            done = asyncio.run(
                call("retry", "--task", "import", "--since", "1h", "--yes", "--json")
            )
            while batch_runs := asyncio.run(
                call("runs", "--state", "queued", "--state", "running", "--json")
            ).json:
                assert len(batch_runs) <= 1_200
        return done

    done = await asyncio.to_thread(work)
    assert (done.json["changed"], done.json["position"], done.json["count"]) == (
        1_200,
        1_200,
        1_200,
    ), done
    assert await states(ledger) == Counter({("import", "succeeded"): 1_200})
    assert {row["attempt"] for row in await rows(ledger)} == {1}


async def test_the_name_of_a_task_means_its_newest_run_everywhere(
    ledger: Database, failures: list[str], call: Any
) -> None:
    newest = failures[0]
    assert (await call("retry", "import", "--json")).json["id"] == newest
    assert (await call("cancel", "import", "--json")).json["id"] == newest
    assert newest in (await call("redrive", "import")).err
    assert (await call("logs", "import")).code == (await call("quarantine", "import")).code == 0
    assert (await call("watch", "import", "--json")).json["id"] == newest
