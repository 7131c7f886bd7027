"""The page of a run: how it gets on, what it waits for, and the lines of its log."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, update

from batch_system import clock
from batch_system.batch.ledger import run_logs, tables
from batch_system.batch.ledger.run_logs import Block, LogLine
from batch_system.database.companions import checkpoints, quarantine
from batch_system.operations.runs import phases
from batch_system.pages import live
from batch_system.pages.live import Kind
from batch_system.verbs.runs import ShowRun
from tests.batch.ledger_world import until
from tests.pages.conftest import People
from tests.pages.test_sizes import insert_run

NOW = datetime.fromisoformat("2026-10-24T07:42:00Z")


async def running(people: People, **values: Any) -> str:
    """A run of the service's node that has processed 400 of 1,000 items in 100 s."""
    began = clock.now() - timedelta(seconds=values.pop("began", 100))
    row = {
        "state": "running",
        "node": people.served.service.node.id,
        "reason": None,
        "fingerprint": None,
        "finished_at": None,
        **dict.fromkeys(("created_at", "due_at"), began - timedelta(seconds=75)),
        **dict.fromkeys(("started_at", "attempt_started_at"), began),
        "count": 400,
        "total": 1_000,
        "count_before": 0,
        "rate": 4.0,
        "progress_at": clock.now(),
    }
    return await insert_run(people, **{**row, **values})


async def commit_chunks(
    people: People, run: str, number: int, items: int, name: str = "chunks:1"
) -> None:
    place = {"after": 1, "chunks": number}
    row = {
        "run": run,
        "name": name,
        "fence": 1,
        "cursor": place,
        "count": items,
        "finished": False,
        "at": clock.now(),
    }
    async with people.served.service.application.engine.begin() as connection:
        await connection.execute(insert(checkpoints).values(row))


async def test_a_run_says_its_chunks_its_wait_its_lease_and_its_timeout(people: People) -> None:
    async with people.served.service.ledger.engine.begin() as connection:
        await connection.execute(
            update(tables.tasks)
            .where(tables.tasks.c.name == "report")
            .values(policies={"timeout": 3_600.0})
        )
    run = await running(people)
    await commit_chunks(people, run, 3, 300)
    await commit_chunks(people, run, 1, 100, "chunks:other")
    html = await people.operator.page(f"/runs/{run}")
    assert "<dt>Chunks committed</dt><dd>4 of about 100 items</dd>" in html
    assert "after 1 min 15 s in the queue" in html
    assert re.search(r"<dt>Lease</dt><dd>\d+ s from each heartbeat</dd>", html)
    assert re.search(r"<dt>Times out</dt><dd><time [^>]*data-relative[^>]*>in 58 min", html)
    assert " for " not in html.partition('id="progress"')[2].partition("</section>")[0]


async def test_a_run_is_expected_to_end_at_one_instant(people: People) -> None:
    """By the rate at its last progress, wherever the page says so."""
    run = await running(people, progress_at=clock.now() - timedelta(seconds=60), rate=1.0)
    story = await phases.story(people.served.service.operations.context, run)
    assert (
        story.expected == (await people.served.service.operations(ShowRun(run=run))).eta is not None
    )


@pytest.mark.parametrize(
    ("chunks", "silent", "words"),
    [
        (4, 300, "no chunk committed for 5 min.*"),  # a chunk takes 25 s
        (4, 200, None),
        (400, 48, r"no chunk committed for (4[89]|5\d) s"),
        (400, 1, None),
        (0, 48, r"no progress for (4[89]|5\d) s"),
        (0, 1, None),
    ],
)
async def test_a_run_that_stands_still_says_since_when(
    people: People, chunks: int, silent: int, words: str | None
) -> None:
    at = clock.now() - timedelta(seconds=silent)
    run = await running(people, began=100 + silent, progress_at=at)
    if chunks:
        await commit_chunks(people, run, chunks, 400)
    html = await people.operator.page(f"/runs/{run}")
    stalled = re.search(r'<div class="c-retrying"[^>]*>(?:<i [^>]*></i>) ([^<]*)</div>', html)
    assert bool(stalled) == bool(words)
    assert stalled is None or words is None or re.fullmatch(words, stalled[1])


async def test_nothing_is_said_of_a_stall_before_the_first_item_and_after_the_end(
    people: People,
) -> None:
    long_ago = clock.now() - timedelta(hours=2)
    for values in ({"count_before": 400}, {"state": "succeeded", "finished_at": clock.now()}):
        run = await running(people, began=8_000, progress_at=long_ago, **values)
        assert "no progress" not in await people.operator.page(f"/runs/{run}")


async def test_a_cancel_says_for_which_chunk_it_waits(people: People) -> None:
    asked = {"cancel_at": clock.now(), "cancel_by": "mara"}
    run = await running(people, **asked)
    html = await people.operator.page(f"/runs/{run}")
    assert "Cancelling</span>" in html and "mara has asked to cancel it." in html
    await commit_chunks(people, run, 412, 400)
    assert "Cancelling, waits for chunk 413</span>" in await people.operator.page(f"/runs/{run}")
    ended = await running(people, state="cancelled", finished_at=clock.now(), **asked)
    html = await people.operator.page(f"/runs/{ended}")
    assert "Cancelling" not in html and f"/runs/{ended}/retry" in html


def block(run: str, fence: int, first: int, *texts: str, level: str = "info") -> Block:
    return Block(
        run, fence, 1, first, [LogLine(NOW.isoformat(), level, "shop", text) for text in texts]
    )


async def write_log(people: People, *blocks: Block) -> None:
    async with people.served.service.ledger.engine.begin() as connection:
        await run_logs.write(connection, run_logs.pack(list(blocks)))


PARCELS = """
from batch_system import ItemTask, Skip

class Parcels(ItemTask):
    name, schedule, skip = "parcels", None, Skip(limit=10)

    def items(self): ...
    async def save(self, item, fetched, db): ...
"""


async def test_a_run_says_how_many_items_may_be_set_aside(people: People, tmp_path: Path) -> None:
    (tmp_path / "tasks" / "parcels.py").write_text(PARCELS)

    async def is_loaded() -> bool:
        return "parcels" in await people.viewer.page("/tasks")

    await until(is_loaded)
    run = await running(people, task="parcels")
    row = {
        "id": run,
        "run": run,
        "task": "parcels",
        "item": "7",
        "error": {},
        "times": 1,
        "at": clock.now(),
    }
    async with people.served.service.application.engine.begin() as connection:
        await connection.execute(insert(quarantine).values(row))
    assert '<a href="#quarantine">1 item</a> of 10 allowed' in await people.viewer.page(
        f"/runs/{run}"
    )


async def test_lines_that_stream_in_have_their_numbers_from_the_first_one(people: People) -> None:
    run = await running(people)
    kind = Kind(f"run:{run}", "", "UTC", "/batch", "viewer")
    operations = people.served.operations
    assert await live._lines(operations, kind, "0.0", 200) == ("", "0.0")
    assert 'id="log-lines"' in await people.viewer.page(f"/runs/{run}")
    await write_log(people, block(run, 1, 0, "a", "b", "<i>c"))
    html, place = await live._lines(operations, kind, "0.0", 2)
    assert re.findall(r'id="L(\d+)" value="\1"', html) == ["1", "2"]
    assert f'href="/batch/runs/{run}?to=501#L1"' in html
    html, place = await live._lines(operations, kind, place, 2)
    assert re.findall(r'id="L(\d+)"', html) == ["3"] and "&lt;i&gt;c" in html
    await write_log(people, block(run, 2, 0, "d"), block(run, 2, 1, "e", level="critical"))
    html, place = await live._lines(operations, kind, place, 200)
    shown = re.findall(r'id="L\d+"', await people.viewer.page(f"/runs/{run}"))
    assert re.findall(r'id="L\d+"', html) == shown[3:] == ['id="L4"', 'id="L5"']
    assert await live._lines(operations, kind, place, 200) == ("", place)


async def test_lines_that_are_critical_have_their_own_level(people: People) -> None:
    run = await running(people)
    await write_log(
        people, block(run, 1, 0, "bad", level="error"), block(run, 1, 1, "worse", level="critical")
    )
    html = await people.viewer.page(f"/runs/{run}?level=CRITICAL")
    assert "worse" in html and ">bad<" not in html
    assert (
        '<li class="n lv-critical" id="L2"' in html and "<option selected>CRITICAL</option>" in html
    )


async def test_a_run_that_was_deleted_is_said_to_be_so(people: People) -> None:
    old, new = "01900000-0000-7000-8000-000000000000", "ffffffff-ffff-7fff-8fff-ffffffffffff"
    assert (
        "it was made on" in (html := await people.viewer.page(f"/runs/{old}", 404))
        and "deleted after" in html
    )
    html = await people.viewer.page(f"/runs/{new}", 404)
    assert f"there is no run with the id {new}" in html and "deleted" not in html
