"""Find, filter or do: what words mean, what is found for them, and who may see and do it."""

from __future__ import annotations

import re
from html import unescape

import pytest

from batch_system.pages.search.meaning import LONGEST, meaning_of
from tests.batch.ledger_world import until
from tests.pages.conftest import People, Person, failed_run
from tests.pages.test_sizes import insert_run

BOX = {"HX-Request": "true", "HX-Target": "div#found"}
LINE = re.compile(r'<a class="it" href="([^"]+)">.*?<span class="cut">(.*?)</span>', re.DOTALL)


async def box(person: Person, words: str) -> str:
    """The block that the script of the command box asks for."""
    answer = await person.client.get("/search", params={"q": words}, headers=BOX)
    assert answer.status_code == 200
    assert "<html" not in answer.text
    return answer.text


def lines(html: str) -> dict[str, str]:
    """The labels of the lines, by their address."""
    found = LINE.findall(html)
    return {unescape(path): unescape(re.sub(r"</?b>", "", label)) for path, label in found}


@pytest.mark.parametrize(
    ("words", "states", "actions", "rest"),
    [
        ("bank failed", ["failed"], [], ["bank"]),
        ("Failed runs of BANK", ["failed"], [], ["bank"]),
        ("fail", ["failed"], [], []),
        ("retry bank", [], ["retry"], ["bank"]),
        ("retrying", ["retrying"], [], []),
        ("ack report 2", [], ["acknowledge"], ["report", "2"]),
        ("no such day", [], [], ["no", "such", "day"]),
        ("failed_import", [], [], ["failed_import"]),
    ],
)
def test_words_are_states_and_actions_and_the_rest_is_text(
    words: str, states: list[str], actions: list[str], rest: list[str]
) -> None:
    meaning = meaning_of(words)
    assert [*meaning.states] == states
    assert [*meaning.actions] == actions
    assert [*meaning.rest] == rest


async def test_the_box_and_the_page_lead_to_the_same_places(people: People) -> None:
    run = await failed_run(people.operator)

    async def with_incident() -> str:
        html = await box(people.operator, "repo failed")
        return html if "/incidents/" in html else ""

    html = str(await until(with_incident))
    found = lines(html)
    assert found == lines(await people.operator.page("/search?q=repo+failed"))
    assert found["/tasks/report"] == "report"
    assert found["/runs?task=report&state=failed"] == "Runs failed of task report"
    assert found["/tasks/report/pause"] == "Pause report until…"
    assert "1 run</span>" in html
    assert "batch runs --task report --state failed" in html
    (incident,) = (path for path in found if re.fullmatch(r"/incidents/[0-9a-f-]{36}", path))
    assert found[incident].startswith("report has been failing since")
    assert f"{incident}/retry" in found and f"{incident}/acknowledge" in found
    for path in found:
        await people.operator.page(path)
    by_end = lines(await box(people.operator, run[-8:]))
    assert [*by_end] == [f"/runs/{run}", f"/runs/{run}/retry", f"/runs/{run}/acknowledge"]
    assert "/tasks/report" in lines(await box(people.operator, "money"))
    assert "/runs?tag=money" in lines(await box(people.operator, "money"))
    assert "1 run of 7 days" in await box(people.operator, "such day")
    assert "1 run of 7 days" in await box(people.operator, "day=never")
    assert [*lines(await box(people.operator, "nigh"))][:1] == ["/"]
    assert incident in lines(await box(people.operator, incident[-8:]))
    retries = lines(await box(people.operator, "retry"))
    assert f"{incident}/retry" in retries


async def test_only_what_the_role_may_do_and_see_is_found(people: People) -> None:
    await failed_run(people.operator)
    seen = lines(await box(people.viewer, "retry report"))
    assert "/tasks/report" in seen
    assert not any(path.endswith(("/retry", "/start", "/pause")) for path in seen)
    run = await insert_run(people, task="payroll", reason="no account 4711", params={"month": 7})
    for words in ("account 4711", "month=7"):
        assert "0 runs of 7 days" in await box(people.viewer, words)
        assert "1 run of 7 days" in await box(people.operator, words)
        assert run not in await people.viewer.page(f"/search?q={words}")
        assert run in await people.operator.page(f"/search?q={words}")
    assert "account 4711" not in await people.viewer.page("/search?q=payroll+failed")
    assert lines(await box(people.admin, "api_key=guess")) == {}
    answer = await people.nobody.get("/search?q=report", headers=BOX)
    assert answer.status_code == 401


@pytest.mark.parametrize(
    "words",
    [
        "<b>x</b>\"'><script>alert(1)</script>",
        "%_%' OR 1=1 --",
        "\\ / ../ \u202e \x1b[31m",
        "failed " * 1_000,
        "a=" + "x" * 10_000,
        "[]{}()*+?.^$|",
    ],
)
async def test_hostile_words_are_only_text(people: People, words: str) -> None:
    html = await box(people.operator, words)
    page = (await people.operator.client.get("/search", params={"q": words})).text
    for text in (html, page):
        assert "<script>alert" not in text and "\u202e" not in text and "<b>x</b>" not in text
    assert len(html) < 10_000
    assert len(meaning_of(words).text) <= LONGEST
    assert not any(path.startswith("/tasks/") for path in lines(html))
