"""`batch runs`: which runs it lists, how the list fits a terminal, and what it says when there are
none.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from batch_system import clock
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.runs import NewRun
from batch_system.cli.runs import COLUMNS
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.operations.asking.results import RunSummary
from tests.batch.ledger_world import know, make_task
from tests.batch.test_runs import insert, new
from tests.cli.test_console import in_terminal, without_styles
from tests.commands import Batch, Done, in_this_process, refuses
from tests.processes import BATCH

REASON = "ValueError: the third column of the second sheet has no number, and so has the fourth"
RED, BLUE, GREEN = "\x1b[31mfailed", "\x1b[34mrunning", "\x1b[32msucceeded"


@pytest.fixture
def batch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    yield from in_this_process(capsys, monkeypatch)


async def fill(ledger: Database) -> list[NewRun]:
    """Four runs, the newest first: queued, running, failed and succeeded."""
    now = clock.now()
    await know(ledger, make_task("import", tags=("nightly",)), make_task("report", pool="gpu"))
    times = [now - timedelta(hours=hours) for hours in (0, 1, 2, 3)]
    made = [
        new("import", created_at=times[0], params={"day": "2026-11-24", "copies": 2}),
        new(
            "report",
            created_at=times[1],
            state="running",
            started_at=times[1],
            fence=1,
            slot=times[1],
        ),
        new(
            "import",
            created_at=times[2],
            state="failed",
            reason=REASON,
            finished_at=now,
            origin="schedule",
        ),
        new(
            "report",
            created_at=times[3],
            state="succeeded",
            finished_at=times[2],
            exclusive=None,
            origin="backfill",
        ),
    ]
    await insert(ledger, *made)
    return made


@pytest.fixture
async def here(tmp_path: Path) -> list[NewRun]:
    """The same in the ledger of this folder."""
    ledger = Database(f"sqlite+aiosqlite:///{tmp_path}/ledger.db", setting="LEDGER_URL")
    await migrate(ledger, LEDGER_HISTORY)
    made = await fill(ledger)
    await ledger.dispose()
    return made


async def listed(batch: Batch, ledger_url: str, *words: str) -> list[str]:
    done = await asyncio.to_thread(batch, "runs", *words, "--json", LEDGER_URL=ledger_url)
    assert done.code == 0, done
    return [row["id"] for row in done.json]


async def test_each_option_narrows_the_list(
    ledger: Database, ledger_url: str, batch: Batch
) -> None:
    queued, running, failed, succeeded = [run.id for run in await fill(ledger)]
    for words, expected in {
        "": [queued, running, failed, succeeded],
        "--tag nightly": [queued, failed],
        "--pool gpu": [running, succeeded],
        "--pool default --tag nightly --state queued": [queued],
        "--pool gpu --tag nightly": [],
        "--state failed --state running": [running, failed],
        "--origin schedule --origin backfill": [failed, succeeded],
        "--ended-since 90m": [failed],
        "--ended-since 1d --task report": [succeeded],
        "--task import --since 1d --param day=2026-11-24 --param copies=2": [queued],
        "--task import --since 1d --param day=2026-11-25": [],
        "--task import --ended-since 1d --text sheet": [failed],
        "--task import --since 1d --text nowhere": [],
        "--limit 1": [queued],
    }.items():
        assert await listed(batch, ledger_url, *words.split()) == expected, words


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--fingerprint 1:0", ["--fingerprint needs --task"]),
        ("--param day=1", ["--param and --text need --task, and --since or --ended-since"]),
        (
            "--text x --task import",
            ["--param and --text need --task, and --since or --ended-since"],
        ),
        ("--param day --task import --since 1d", ["--param", "'day'", "name=value"]),
        ("--origin moon", ["origin", "'moon'", "manual"]),
        ("--state failing", ["'failing'", "failed"]),
        ("--tag Not-a-tag", ["tag", "'Not-a-tag'"]),
        ("--pool GPU", ["pool", "'GPU'"]),
        ("--task imprt", ["'imprt'", "did you mean import?"]),
    ],
)
def test_an_invalid_filter_is_refused(
    here: list[NewRun], batch: Batch, words: str, named: list[str]
) -> None:
    refuses(batch("runs", *words.split()), *named)


async def test_an_id_is_shown_short_and_found_by_that_and_is_whole_in_json(
    ledger: Database, ledger_url: str, batch: Batch
) -> None:
    made = await fill(ledger)
    done: Done = await asyncio.to_thread(batch, "runs", LEDGER_URL=ledger_url)
    short = [line.split()[0] for line in done.out.splitlines()[1:]]
    assert short == [run.id[-8:] for run in made]
    for run, id in zip(made, short, strict=True):
        assert (await asyncio.to_thread(batch, "show", id, "--json")).json["id"] == run.id


def test_the_columns_are_always_the_same_in_a_pipe(here: list[NewRun], batch: Batch) -> None:
    for words in ("--state queued", "--state failed", ""):
        assert batch("runs", *words.split()).out.splitlines()[0].split() == [*COLUMNS, "reason"]
    assert list(batch("runs", "--json").json[0]) == list(RunSummary.model_fields)


@pytest.mark.parametrize("words", ["--state skipped", "--since 0s"])
def test_no_runs_are_said_in_words(here: list[NewRun], batch: Batch, words: str) -> None:
    done = batch("runs", *words.split())
    assert (done.code, done.out) == (0, "") and done.err.startswith("batch: no runs match\n")
    assert batch("runs", *words.split(), "--json") == Done(0, "[]\n", "")


def test_a_monitor_can_ask_by_the_exit_code(here: list[NewRun], batch: Batch) -> None:
    assert batch("runs", "--state", "failed", "--ended-since", "1h", "--exit-code").code == 1
    assert (
        batch("runs", "--state", "failed", "--ended-since", "1h", "--exit-code", "--json").code == 1
    )
    assert batch("runs", "--state", "skipped", "--ended-since", "1h", "--exit-code").code == 0
    assert batch("runs", "--state", "failed", "--ended-since", "1h").code == 0


def table(folder: Path, columns: int, **settings: str) -> str:
    shown = in_terminal(folder, [*BATCH, "runs"], columns, **settings)
    return "\n".join(
        line
        for line in shown.splitlines()
        if "no service is running" not in line and "says more" not in line
    )


@pytest.mark.parametrize(
    "columns",
    [
        20,
        80,
        300,
        *(pytest.param(width, marks=pytest.mark.nightly) for width in (40, 60, 120, 200)),
    ],
)
def test_no_line_is_wider_than_the_terminal_and_each_run_has_one(
    here: list[NewRun], tmp_path: Path, columns: int
) -> None:
    lines = without_styles(table(tmp_path, columns))[:5]
    assert [line.split()[0] for line in lines] == ["id", *(run.id[-8:] for run in here)]
    assert all(len(line) <= columns for line in lines)
    if columns >= 40:
        assert "failed" in lines[3]
    if columns >= 60:
        assert "ValueError: the" in lines[3]
    if columns == 300:
        assert REASON in lines[3] and lines[0].split() == [*COLUMNS, "reason"]


def test_a_reason_that_is_cut_ends_visibly(here: list[NewRun], tmp_path: Path) -> None:
    assert re.search(r"ValueError: the.*…$", without_styles(table(tmp_path, 80))[3])


def test_states_have_colours_in_a_terminal_that_shows_them(
    here: list[NewRun], batch: Batch, tmp_path: Path
) -> None:
    coloured = table(tmp_path, 120)
    assert all(state in coloured for state in (RED, BLUE, GREEN))
    assert "\x1b[3" not in table(tmp_path, 120, NO_COLOR="1")
    assert "\x1b[" not in batch("runs").out
