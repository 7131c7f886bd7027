"""Live pages: parts are rendered once for all who see the same, and only what has changed is
sent.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import event as database_event

from batch_system.errors import DatabaseError
from batch_system.operations.night import page
from batch_system.pages import live
from batch_system.pages.frame import watch
from batch_system.pages.frame.watch import Part, Watch, data_of
from batch_system.pages.live import NIGHT, SOURCES, Kind
from batch_system.pages.night import night
from batch_system.pages.runs import log_tail
from batch_system.pages.runs.log_tail import LogTail
from batch_system.web.stream import Event
from tests.pages.conftest import People


class Source:
    """A page whose parts a test sets."""

    def __init__(self, **parts: str) -> None:
        self.parts = parts
        self.rendered = 0
        self.is_broken = False

    async def make(self) -> Sequence[Part]:
        self.rendered += 1
        await asyncio.sleep(0)
        if self.is_broken:
            raise DatabaseError("the ledger can't be read")
        return [Part(name, "innerMorph", html) for name, html in self.parts.items()]


def event(number: int) -> Event:
    return Event.of(f"node.{number}", "runs", "run", "{}", 0.0)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page may be rendered as often as there is a reason."""
    monkeypatch.setattr(watch, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(watch, "MOST_SHARE", 0.0)


async def test_an_event_renders_the_page_once_for_all_who_watch() -> None:
    source = Source(a="1")
    page = Watch(source.make, 1_000.0)
    await asyncio.gather(*(page.refresh() for _ in range(50)))
    for _ in range(50):
        page.note([event(1)])
    await asyncio.gather(*(page.refresh() for _ in range(50)))
    for _ in range(50):
        page.note([event(1)])  # a stream that is slower gets the same event later
        await page.refresh()
    assert source.rendered == 2


async def test_only_what_changed_is_sent_and_the_same_bytes_to_all() -> None:
    source = Source(a="1", b="1")
    page = Watch(source.make, 0.0)
    await page.refresh()
    first = page.version
    assert page.changes(0) == data_of([Part("a", "innerMorph", "1"), Part("b", "innerMorph", "1")])
    source.parts["b"] = "2"
    await page.refresh()
    assert page.changes(first) == data_of([Part("b", "innerMorph", "2")])
    assert page.changes(first) is page.changes(first)
    assert page.changes(page.version) == b""


async def test_a_chart_that_moves_is_not_sent_each_second() -> None:
    source = Source(chart="1", verdict="1")
    page = Watch(source.make, 0.0, slow=["chart"])
    await page.refresh()
    assert page.changes(0) == data_of([Part("verdict", "innerMorph", "1")])
    source.parts["chart"] = "2"
    await page.refresh()
    assert page.changes(page.version) == page.changes(1) == b""


async def test_a_page_that_can_not_be_read_is_not_fresh_and_is_read_again() -> None:
    source = Source(a="1")
    page = Watch(source.make, 1_000.0)
    source.is_broken = True
    await page.refresh()
    assert not page.is_fresh
    source.is_broken = False
    await page.refresh()
    assert page.is_fresh
    assert page.changes(0)


@pytest.mark.parametrize("fails", [True, False])
async def test_a_process_that_was_stopped_while_it_rendered_renders_soon_again(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Its rendering seems to have taken long, and may have failed, since its connections were ended
    meanwhile.
    """
    monkeypatch.setattr(watch, "MOST_SHARE", 4.0)
    now = 100.0
    monkeypatch.setattr(watch.clock, "monotonic", lambda: now)
    source = Source(a="1")
    page = Watch(source.make, 0.0)

    async def stopped_meanwhile() -> Sequence[Part]:
        nonlocal now
        now += 60
        return await source.make()

    monkeypatch.setattr(page, "_make", stopped_meanwhile)
    source.is_broken = fails
    await page.refresh()
    monkeypatch.setattr(page, "_make", source.make)
    source.is_broken = False
    now += 0.1 if fails else watch.MOST_REST
    await page.refresh()
    assert page.is_fresh and source.rendered == 2


def test_every_line_of_a_part_is_a_line_of_the_event() -> None:
    data = data_of([Part("log", "beforeend", "one\r\ntwo\rthree\n\nevent: reload")])
    assert all(line.startswith(b"data: ") for line in data.splitlines())


async def test_the_end_of_a_log_is_read_once_for_all_who_have_seen_the_same() -> None:
    asked: list[str] = []

    async def read(place: str, most: int) -> tuple[str, str]:
        asked.append(place)
        assert most == log_tail.MOST_LINES
        return "<li>new</li>", "1.5"

    tail = LogTail(read)
    answers = await asyncio.gather(*(tail.after("1.2") for _ in range(50)))
    assert asked == ["1.2"]
    assert {answer.place for answer in answers} == {"1.5"}


@pytest.mark.parametrize("topic", ["night", "tasks", "runs", "run"])
async def test_what_is_shared_holds_nothing_of_one_person(people: People, topic: str) -> None:
    run = (
        await people.operator.client.post(
            "/tasks/report/start", data={"csrf": await people.operator.csrf()}
        )
    ).headers
    name = f"run:{run['location'].rpartition('/')[2]}" if topic == "run" else topic
    kind = Kind(name, "", "Europe/Berlin", "", "admin")
    parts = await live._page(people.served.operations, kind, SOURCES[topic], {})
    html = "".join(part.html for part in parts)
    assert html
    assert not re.search(r'name="csrf" value="[^"]', html)
    page = await people.admin.page(
        f"/runs/{name[4:]}" if topic == "run" else NIGHT.path if topic == "night" else f"/{topic}"
    )
    missing = [part.target for part in parts if f'id="{part.target}"' not in page]
    assert missing == []


@pytest.mark.parametrize("query", ["topic=all", "topic=run:1", "topic=runs&text=" + "x" * 9_000])
async def test_a_stream_of_something_else_is_refused(people: People, query: str) -> None:
    assert (await people.viewer.client.get(f"/live?{query}")).status_code == 422


async def test_nobody_gets_no_stream_and_is_not_led_to_another_page(people: People) -> None:
    assert (await people.nobody.get("/live?topic=night")).status_code == 401


def test_names_that_a_page_does_not_know_make_no_further_page_to_watch() -> None:
    given = [("x", "1"), ("state", "failed"), ("after", "2")]
    assert live._query_of("runs", given) == "after=2&state=failed"
    assert live._query_of("night", given) == live._query_of("nodes", given) == ""


async def test_who_is_far_behind_gets_the_whole_page_so_that_few_answers_are_kept() -> None:
    source = Source(a="0")
    page = Watch(source.make, 1_000.0)
    for number in range(1, 30):
        source.parts["a"] = str(number)
        page.note([event(number)])
        await page.refresh()
        for seen in range(number):
            assert page.changes(seen)
    assert len(page._told) <= watch.MOST_BEHIND + 2


async def poll(people: People, path: str, element: str, status: int = 200) -> str:
    """What a page that is open gets for one of its blocks. `element`: as htmx names the one that it
    will change.
    """
    answer = await people.viewer.client.get(
        path, headers={"HX-Request": "true", "HX-Target": element}
    )
    assert answer.status_code == status, answer.text[:2_000]
    return answer.text


@pytest.mark.parametrize(
    ("path", "element"),
    [
        ("/tasks?range=6", "div#numbers"),
        ("/tasks?range=6", "section#timeline"),
        ("/tasks/report", "div#of-task"),
        ("/nodes", "section#all-nodes"),
        ("/nodes", "section#pools"),
        ("/", "div#p-lanes"),
    ],
)
async def test_a_poll_of_a_block_is_answered_with_this_block_alone(
    people: People, path: str, element: str
) -> None:
    _, _, name = element.partition("#")
    whole, html = await people.viewer.page(path), await poll(people, path, element)
    own = '<section class="card" id="lanes"' if name == "p-lanes" else f'id="{name}"'
    assert own in whole and own in html
    assert "<header" in whole and "<header" not in html and 'id="nodes"' not in html
    polled = [
        found
        for found in ("numbers", "timeline", "of-task", "all-nodes", "pools")
        if f'id="{found}"' in html
    ]
    assert polled == [name] * (name != "p-lanes")
    if name != "p-lanes":
        assert (
            f'hx-get="{path}" hx-trigger="refresh" hx-select="#{name}" hx-target="#{name}"' in html
        )


async def test_a_poll_of_a_block_does_not_read_what_other_blocks_show(people: People) -> None:
    statements: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *others: Any) -> None:
        statements.append(statement)

    async def reads_lanes(element: str) -> bool:
        statements.clear()
        await poll(people, "/tasks", element)
        return any("origin = 'manual'" in statement for statement in statements)

    engine = people.served.service.ledger.reader.sync_engine
    database_event.listen(engine, "before_cursor_execute", note)
    assert await reads_lanes("section#timeline")
    with_timeline = len(statements)
    assert not await reads_lanes("div#numbers")
    assert len(statements) < with_timeline


async def test_no_page_polls_by_itself_because_a_hidden_tab_would_go_on(people: People) -> None:
    for path in ("/", "/tasks", "/tasks/report", "/runs", "/nodes", "/backups"):
        html = await people.viewer.page(path)
        assert "every " not in "".join(re.findall(r'hx-trigger="[^"]*"', html)), path


async def test_a_poll_of_somebody_who_was_signed_out_is_refused_and_not_led_to_another_page(
    people: People,
) -> None:
    answer = await people.nobody.get(
        "/tasks", headers={"HX-Request": "true", "HX-Target": "div#numbers"}
    )
    assert answer.status_code == 401


def broken(*given: Any) -> Any:
    raise ValueError("a mistake of ours")


async def test_a_block_that_fails_says_so_and_the_others_are_shown(
    people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "<h2>What changed</h2>" in await people.viewer.page("/")
    monkeypatch.setattr(night, "lines_of", broken)
    html = await people.viewer.page("/")
    assert html.count("This part could not be shown") == 1
    assert "<h2>What changed</h2>" not in html
    assert "<h2>Last verified backup</h2>" in html and "<h2>Planned and actual</h2>" in html
    assert re.search(r'class="card verdict[\w ]* old"', html)
    assert 'class="card verdict calm' not in html
    await poll(people, "/", "div#p-changes", 500)
    await poll(people, "/", "div#p-backup")


async def test_the_verdict_is_not_calm_if_a_block_fails(
    people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = await page.night_page(people.served.operations.context, None, None, "UTC")
    calm = replace(found, night=found.night.model_copy(update={"level": "calm", "needs": []}))

    async def read(*given: Any) -> Any:
        return calm

    monkeypatch.setattr("batch_system.pages.night.night.night_page", read)
    assert 'class="card verdict calm"' in await people.viewer.page("/")
    monkeypatch.setattr(night, "night_chart", broken)
    html = await people.viewer.page("/")
    assert 'class="card verdict  old"' in html
    assert '<h2 data-say="unsure" data-words="A part of this page could not be shown."' in html


async def test_a_page_all_of_whose_blocks_fail_is_an_error(
    people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(night, "BLOCKS", ("chart", "lanes"))
    monkeypatch.setattr(night, "night_chart", broken)
    await people.viewer.page("/", 500)


async def test_a_block_that_can_not_be_rendered_again_keeps_what_it_shows(
    people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, kept = Kind("night", "", "UTC", "", "viewer"), dict[str, tuple[str, str]]()
    before = {
        part.target: part.html
        for part in await live._page(people.served.operations, kind, NIGHT, kept)
    }
    monkeypatch.setattr(night, "lines_of", broken)
    after = {
        part.target: part.html
        for part in await live._page(people.served.operations, kind, NIGHT, kept)
    }
    note = re.search(
        r'<span class="not-refreshed sm">Could not refresh, from (\S+) .*?</span>',
        after["p-changes"],
    )
    assert note is not None and note[1] == kept["changes"][1]
    assert after["p-changes"].replace(note[0], "") == before["p-changes"].replace(note[0], "")
    assert "Could not refresh" not in after["p-backup"] + after["p-verdict"]
    assert " old" in after["p-verdict"]
