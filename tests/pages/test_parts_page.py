"""The page of a run that was split: its parts as a map and as a list, and the retry of those that failed."""

from __future__ import annotations

from datetime import timedelta

from service import clock
from tests.pages.conftest import People
from tests.pages.test_sizes import insert_run


async def split_run(people: People, states: list[str], state: str = "failed") -> str:
    """A run with a part in each of these states; the parts take longer by their numbers."""
    now = clock.now()
    run = await insert_run(
        people, state=state, gate="parts", reason=None, finished_at=None if state != "failed" else now
    )
    for number, each in enumerate(states, start=1):
        began = now - timedelta(seconds=100)
        ended = began + timedelta(seconds=number) if each in ("succeeded", "failed") else None
        times = {"started_at": began, "finished_at": ended}
        reason = f"OSError: no network {number}" if each == "failed" else None
        own = {"origin": "part", "part": number, "awaited_by": run, "parent": run, "slot": None, "count": 10}
        await insert_run(people, **{**own, **times, "state": each, "reason": reason, "fingerprint": None})
    return run


async def test_the_parts_are_shown_with_those_that_failed_first_and_then_the_slowest_ones(people: People) -> None:
    run = await split_run(people, ["succeeded", "succeeded", "failed", "succeeded"])
    html = await people.operator.page(f"/runs/{run}")
    card = html.partition('id="parts"')[2].partition("</section>")[0]
    assert "4 parts, 1 failed, 3 succeeded" in card
    assert "Retry those that failed" in card
    assert card.count('class="bar-succeeded"') == 3
    assert card.count('class="bar-failed"') == 1
    numbers = [row.partition("</td>")[0] for row in card.split('<tr><td class="num">')[1:]]
    assert numbers == ["3", "4", "2", "1"]
    assert "OSError: no network 3" in card


async def test_a_run_that_waits_says_for_how_many_of_its_parts(people: People) -> None:
    run = await split_run(people, ["succeeded", "running", "running"], state="waiting")
    html = await people.operator.page(f"/runs/{run}")
    assert "It waits for 2 of its 3 parts." in html
    details = await people.served.service.operations.runs.show(run)
    assert (details.count, details.parts and details.parts.order) == (30, ["succeeded", "running", "running"])


async def test_lists_have_no_parts_unless_they_are_asked_for(people: People) -> None:
    run = await split_run(people, ["succeeded", "failed"])
    found = await people.served.service.operations.runs.list()
    assert {each.origin for each in found.runs} == {"manual"}
    part = await people.operator.page("/runs?origin=part")
    assert part.count(f'/runs/{run}"') == 0
    assert "OSError: no network 2" in part
