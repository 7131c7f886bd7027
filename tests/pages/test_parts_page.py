"""The page of a run that was split: its parts as a map and as a list, and the retry of those that
failed.
"""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import update

from batch_system import clock
from batch_system.batch.ledger import tables
from batch_system.operations.asking.filter import RunFilter
from batch_system.operations.runs import listing, read
from batch_system.operations.runs import phases as phases_of
from batch_system.operations.runs.chain import chain as chain_of
from batch_system.verbs.runs import ShowRun
from tests.pages.conftest import People
from tests.pages.test_sizes import insert_run


async def split_run(
    people: People, states: list[str], state: str = "failed", **values: object
) -> str:
    """A run with a part in each of these states; the parts take longer by their numbers.

    The parts are there before it waits for them, or the service would find that all are over.
    """
    now, run = clock.now(), tables.new_id()
    for number, each in enumerate(states, start=1):
        began = now - timedelta(seconds=100)
        ended = began + timedelta(seconds=number) if each in ("succeeded", "failed") else None
        times = {"started_at": began, "finished_at": ended}
        reason = f"OSError: no network {number}" if each == "failed" else None
        own = {
            "origin": "part",
            "part": number,
            "awaited_by": run,
            "parent": run,
            "slot": None,
            "count": 10,
        }
        await insert_run(
            people, **{**own, **times, "state": each, "reason": reason, "fingerprint": None}
        )
    finished_at = now if state == "failed" else None
    await insert_run(
        people, id=run, state=state, gate="parts", reason=None, finished_at=finished_at, **values
    )
    return run


async def test_the_parts_are_shown_with_those_that_failed_first_and_then_the_slowest_ones(
    people: People,
) -> None:
    run = await split_run(people, ["succeeded", "succeeded", "failed", "succeeded"])
    html = await people.operator.page(f"/runs/{run}")
    card = html.partition('id="parts"')[2].partition("</section>")[0]
    assert "4 parts, 1 failed, 3 succeeded" in card
    assert "Retry those that failed" in card
    assert card.count('class="bar-succeeded"') == 3
    assert card.count('class="bar-failed"') == 1
    numbers = [row.partition("</td>")[0] for row in card.split('<tr><td class="c-name">')[1:]]
    assert numbers == ["3", "4", "2", "1"]
    assert "OSError: no network 3" in card


async def test_a_run_that_waits_says_for_how_many_of_its_parts(people: People) -> None:
    run = await split_run(people, ["succeeded", "running", "running"], state="waiting")
    html = await people.operator.page(f"/runs/{run}")
    assert "It waits for 2 of its 3 parts." in html
    assert "1 of 3 parts done" in await people.operator.page("/runs?state=waiting")
    details = await people.served.service.operations(ShowRun(run=run))
    assert (details.count, details.parts and details.parts.order) == (
        30,
        ["succeeded", "running", "running"],
    )


async def test_the_time_between_split_and_end_is_told_as_that_of_its_parts_and_these_are_no_chain(
    people: People,
) -> None:
    now = clock.now()
    began = {
        "started_at": now - timedelta(seconds=90),
        "attempt_started_at": now - timedelta(seconds=2),
    }
    run = await split_run(people, ["succeeded", "failed"], **began)
    context = people.served.service.operations.context
    async with people.served.service.ledger.engine.begin() as connection:
        split = {
            "outcome": "split",
            "started_at": now - timedelta(seconds=90),
            "ended_at": now - timedelta(seconds=80),
        }
        await connection.execute(
            update(tables.attempts).where(tables.attempts.c.run == run).values(split)
        )
    phases = (await phases_of.story(context, run)).phases
    assert [(phase.kind, phase.outcome) for phase in phases if phase.kind != "wait"] == [
        ("attempt", "split"),
        ("parts", None),
    ]
    parts = await listing.list_runs(context, RunFilter(parent=run))
    assert [
        (await chain_of(context, each)).is_one for each in (run, *(part.id for part in parts.runs))
    ] == [False] * 3
    html = await people.operator.page(f"/runs/{run}")
    assert f"/runs/{run}/acknowledge" in html
    failed = next(part.id for part in parts.runs if part.state == "failed")
    assert f"/runs/{failed}/acknowledge" not in await people.operator.page(f"/runs/{failed}")
    assert "1 min 30 s" in html.partition('id="run-id"')[2].partition("</p>")[0]


async def test_the_total_is_known_once_all_parts_have_told_theirs(people: People) -> None:
    run = await split_run(people, ["succeeded", "running"], state="waiting")
    context = people.served.service.operations.context
    async with people.served.service.ledger.engine.begin() as connection:
        theirs = update(tables.runs).where(tables.runs.c.awaited_by == run)
        await connection.execute(theirs.where(tables.runs.c.part == 1).values(total=10))
    assert ((await read.show(context, run)).count, (await read.show(context, run)).total) == (
        20,
        None,
    )
    async with people.served.service.ledger.engine.begin() as connection:
        await connection.execute(theirs.where(tables.runs.c.part == 2).values(total=30))
    assert (await read.show(context, run)).total == 40


async def test_a_retry_says_that_it_runs_the_parts_that_did_not_succeed(people: People) -> None:
    run = await split_run(people, ["succeeded", "failed"])
    html = await people.operator.page(f"/runs/{run}/retry")
    assert "Run the parts that did not succeed" in html and "it is split anew" in html
    assert "last checkpoint" not in html


async def test_all_parts_of_a_run_with_many_are_one_click_away(people: People) -> None:
    run = await split_run(people, ["succeeded"] * 24 + ["failed"])
    html = await people.operator.page(f"/runs/{run}")
    card = html.partition('id="parts"')[2].partition("</section>")[0]
    assert card.count('<td class="c-name">') == 20
    assert card.count("<rect ") == 25
    assert f'href="/runs?parent={run}">All 25 parts' in card
    listed = await people.operator.page(f"/runs?parent={run}")
    assert listed.count('<tr id="r-') == 25
    parts = await listing.list_runs(people.served.service.operations.context, RunFilter(parent=run))
    part = await people.operator.page(f"/runs/{parts.runs[0].id}")
    assert f'of <a class="mono" href="/runs/{run}"' in part


async def test_lists_have_no_parts_unless_they_are_asked_for(people: People) -> None:
    run = await split_run(people, ["succeeded", "failed"])
    found = await listing.list_runs(people.served.service.operations.context, RunFilter())
    assert {each.origin for each in found.runs} == {"manual"}
    part = await people.operator.page("/runs?origin=part")
    assert part.count(f'/runs/{run}"') == 0
    assert "OSError: no network 2" in part
