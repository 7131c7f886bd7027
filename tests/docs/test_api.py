"""The page about the HTTP API and the reference that is made from the code: each resource has its
role and an example, and each example is sent to a service.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select
from starlette.routing import compile_path

from batch_system import get_db
from batch_system.app import create_app
from batch_system.batch.ledger import run_query, tables
from batch_system.batch.ledger.states import ACTIVE
from batch_system.operations.asking import actor
from batch_system.operations.asking.filter import RunFilter
from batch_system.operations.backups.backups import Backups
from batch_system.operations.bulks import bulk
from batch_system.operations.people import access
from batch_system.operations.people.results import MOST_CHANGES
from batch_system.operations.runs.results import MOST_RUNS
from batch_system.server.service import BatchService
from batch_system.verbs.access import LONGEST_DAYS
from batch_system.verbs.run_changes import LONGEST_KEY
from batch_system.verbs.runs import ShowLog
from batch_system.web import events, headers, live, problems, routes
from service.application.models import User
from tests.batch.ledger_world import until
from tests.docs_blocks import Message, blocks, exchanges, masked, read, rows, section
from tests.stored import FOLDER
from tests.web.conftest import client_of
from tests.web.test_access import NEEDED
from tools.reference import api, examples

PAGE = read("docs/api.md")
TEXT = f"{PAGE}\n{read('tools/api_examples.md')}"
EXAMPLES = [*exchanges(TEXT)]
MORE = "…"
"""In an answer on the page: the key of further fields, the end of a list with further items, or any
value.
"""


@cache
def document() -> dict[tuple[str, str], Any]:
    """The resources of the stored document, which tests/test_stored.py compares with the real one:
    each worker reads the names when it collects the tests.
    """
    paths = json.loads((FOLDER / "openapi.json").read_text())["paths"]
    return {
        (m.upper(), path.removeprefix(routes.V1)): entry
        for path, ms in paths.items()
        for m, entry in ms.items()
    }


def resource_of(request: Message) -> tuple[str, str]:
    method, path = request.start.split(" ")
    path = path.partition("?")[0].removeprefix(routes.V1)
    matching = [p for m, p in document() if m == method and compile_path(p)[0].match(path)]
    return method, min(matching, key=lambda p: p.count("{"))


# The page and the reference have what is there.


@pytest.mark.parametrize("name", document(), ids=" ".join)
def test_the_reference_has_each_resource_with_its_role(name: tuple[str, str]) -> None:
    method, path = name
    role = NEEDED.get(name)
    needs = f"Needs the role {role}." if role else "Needs no role."
    assert needs in section_of(f"{method} {routes.V1}{path}")


@cache
def reference() -> str:
    return api()


def section_of(resource: str) -> str:
    return reference().split(f"\n## {resource}\n")[1].split("\n## ")[0]


def test_the_reference_shows_the_examples_that_the_page_does_not() -> None:
    of_the_page = {resource_of(request) for request, _ in exchanges(PAGE)}
    for method, path in document():
        shown = section_of(f"{method} {routes.V1}{path}")
        is_there = "```http" in shown
        assert is_there or ((method, path) in of_the_page and "../api.md" in shown), (method, path)


def test_a_section_of_examples_is_of_a_resource_that_is_there() -> None:
    assert {*examples()} <= {" ".join(name) for name in document()}


def test_each_resource_has_an_example() -> None:
    assert document().keys() - {resource_of(request) for request, _ in EXAMPLES} == set()


def test_the_reference_has_every_filter_of_runs() -> None:
    listed = rows(section_of("GET /api/v1/runs"))
    assert {*RunFilter.model_fields} <= {*listed}
    assert all(cells[-1] for cells in listed.values())


def test_the_page_has_the_statuses_and_kinds_of_problems() -> None:
    table = rows(section("docs/api.md", "## Problems"))
    statuses = {**{status: kind for kind, status in problems.STATUSES.items()}, **problems.KINDS}
    assert table.keys() == {str(status) for status in problems.TITLES}
    for status, kind in statuses.items():
        assert f"`{kind}`" in table[str(status)][0], status


def test_the_page_has_the_roles_and_the_topics() -> None:
    assert list(rows(section("docs/api.md", "### Roles"))) == list(actor.ROLES)
    topics = [
        name
        for name in rows(section("docs/api.md", "## Live events"))
        if not name.startswith("GET ")
    ]
    assert topics == ["runs", "run:ID", "tasks", "nodes"]
    assert all(
        re.fullmatch(events.TOPIC, topic.replace("ID", "0" * 8 + "-0000" * 3 + "-" + "0" * 12))
        for topic in topics
    )


LIMITS = {
    "a page of runs": MOST_RUNS,
    "a page of the audit": MOST_CHANGES,
    "runs looked at": run_query.LOOKED,
    "a body": headers.LARGEST_BODY,
    "a bulk": bulk.MOST_RUNS,
    "streams of one token": live.MOST_STREAMS_OF_ONE,
    "streams of a process": live.MOST_STREAMS,
    "watched runs": live.MOST_RUNS,
    "a key": LONGEST_KEY,
    "days of a token": LONGEST_DAYS,
    "lines of a log": next(
        m.le for m in ShowLog.model_fields["limit"].metadata if hasattr(m, "le")
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_of_the_page_is_that_of_the_code(name: str) -> None:
    numbers = re.findall(r"\d[\d,]*", section("docs/api.md", "## Limits"))
    assert f"{LIMITS[name]:,}" in numbers


# Each example is sent, in the order of the page.

SECRETS = re.compile(
    r"b[tls]_[0-9a-f]{12}_[\w-]{43}"
    r"|(?:\d{16}_)?[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}"
    r"|\b[0-9a-f]{64}\b|\b[0-9a-f]{12}\b"
    r"|\bbackup_\d{8}_\d{6}\.backup\.gz\b"
)
"""What is new each time, and is used by later requests: secrets, ids, cursors, CSRF tokens, names
of backups.
"""
YOURS = next(secret for secret in SECRETS.findall(TEXT) if secret.startswith("bt_0"))
"""The token that the reader has."""
SAME = {
    *("action", "actor", "by", "check", "cron", "description", "detail", "field", "item"),
    *("kept", "kind", "level", "logger", "message", "name", "note", "origin", "outcome"),
    *("place", "reason", "requested_by", "role", "schedule", "source", "state", "task", "text"),
    *("timezone", "title", "type", "words"),
}
"""The keys whose values have to be as they are shown."""


@dataclass
class Reader:
    """Sends the requests of the page, with what the service has answered in place of what the page
    shows.
    """

    app: Any
    service: BatchService
    admin: httpx.AsyncClient
    nobody: httpx.AsyncClient
    learned: dict[str, str] = field(default_factory=dict)

    async def play(self, request: Message, shown: Message) -> None:
        if request.start.startswith("GET "):
            await self._rest()
        if resource_of(request) == ("GET", "/events"):
            await self._compare_events(request, shown)
        else:
            self._compare_answer(shown, await self._answer(request))

    async def _answer(self, request: Message) -> httpx.Response:
        method, path = self._with_learned(request.start).split(" ")
        headers = {name: self._with_learned(value) for name, value in request.headers.items()}
        is_of_nobody = "cookie" in headers or resource_of(request) == ("POST", "/session")
        if request.body:
            headers["content-type"] = "application/json"
        client = self.nobody if is_of_nobody else self.admin
        answer = await client.request(
            method, path, content=self._with_learned(request.body) or None, headers=headers
        )
        self.nobody.cookies.clear()
        return answer

    def _compare_answer(self, shown: Message, answer: httpx.Response) -> None:
        assert f"{answer.status_code} {answer.reason_phrase}" == shown.start, answer.text
        for name, value in shown.headers.items():
            self.compare(value, answer.headers[name], name)
        if shown.body.startswith("{"):
            self.compare(json.loads(shown.body), answer.json(), "body")
        else:
            assert masked(shown.body) == masked(answer.text)

    def _with_learned(self, text: str) -> str:
        return SECRETS.sub(lambda found: self.learned.get(found[0], found[0]), text)

    async def _rest(self) -> None:
        """Wait until no run and no bulk is under way."""
        active = (
            select(func.count()).select_from(tables.runs).where(tables.runs.c.state.in_(ACTIVE))
        )

        async def is_at_rest() -> bool:
            # Asked first: its last step makes runs.
            if await bulk.under_way(self.service.operations.context):
                return False
            async with self.service.ledger.reader.connect() as connection:
                return bool((await connection.execute(active)).scalar_one() == 0)

        await until(is_at_rest)

    def compare(self, shown: Any, found: Any, place: str) -> None:
        """The shape of what is shown has to be that of the answer: keys, types, and the lengths of
        lists.
        """
        if shown == MORE:
            return
        assert _kind(shown) == _kind(found), f"{place}: {found!r} is shown as {shown!r}"
        if isinstance(shown, dict):
            self._compare_object(shown, found, place)
        elif isinstance(shown, list):
            items = [item for item in shown if item != MORE]
            assert len(found) == len(items) or (len(found) > len(items) and MORE in shown), (
                f"{place}: {found}"
            )
            for number, item in enumerate(items):
                self.compare(item, found[number], f"{place}.{number}")
        elif isinstance(shown, str):
            self._learn(shown, found, place)

    def _compare_object(self, shown: dict[str, Any], found: dict[str, Any], place: str) -> None:
        names = shown.keys() - {MORE}
        is_same = names < found.keys() if MORE in shown else names == found.keys()
        assert is_same, f"{place}: the answer has {', '.join(found)}"
        for name in names:
            self.compare(shown[name], found[name], f"{place}.{name}")
            if name in SAME and isinstance(shown[name], str):
                assert self._with_learned(shown[name]) == found[name], f"{place}.{name}"

    def _learn(self, shown: str, found: str, place: str) -> None:
        """Learn the ids and secrets that a text has; it has to have as many as are shown."""
        ours, theirs = SECRETS.findall(shown), SECRETS.findall(found)
        assert len(ours) == len(theirs), f"{place}: {found!r} is shown as {shown!r}"
        self.learned.update(zip(ours, theirs, strict=True))

    async def _compare_events(self, asked: Message, shown: Message) -> None:
        """Start a run while the stream is open, and read up to the first event."""
        received, gone = bytearray(), asyncio.Event()
        has_event = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            received.extend(message.get("body", b""))
            if b"\ndata: " in received:
                has_event.set()

        request = self.admin.build_request(*asked.start.split(" "))
        scope = {
            "type": "http",
            "method": "GET",
            "scheme": "http",
            "path": request.url.path,
            "raw_path": request.url.raw_path,
            "query_string": request.url.query,
            "root_path": "",
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "client": ("127.0.0.1", 1234),
            "server": ("localhost", 80),
            "http_version": "1.1",
            "state": {},
        }
        streaming = asyncio.create_task(self.app(scope, receive, send))
        async with asyncio.timeout(20):
            while not has_event.is_set():  # the reader tells what has changed since its first look
                await self.admin.post("/api/v1/tasks/report/runs", json={"parameters": {}})
                await asyncio.wait({asyncio.create_task(has_event.wait())}, timeout=1.2)
            gone.set()
            await streaming
        text = received.decode()
        for kind in ("retry", "id", "event"):
            assert re.search(rf"^{kind}: ", text, re.MULTILINE) and f"{kind}: " in shown.body
        data = [re.findall(r"^data: (.*)$", body, re.MULTILINE)[0] for body in (shown.body, text)]
        self.compare(json.loads(data[0]), json.loads(data[1]), "data")


def _kind(value: Any) -> str:
    """The type of a JSON value, as JSON Schema names it."""
    return (
        "number"
        if isinstance(value, int | float) and not isinstance(value, bool)
        else type(value).__name__
    )


BANK = """
[dates]
2026-12-24 = "Christmas Eve"
2026-12-31 = "New Year's Eve"
"""


@pytest.fixture
async def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Reader]:
    (tmp_path / "calendars").mkdir()
    (tmp_path / "calendars" / "bank.toml").write_text(BANK)
    for block in blocks(TEXT, "python"):
        if block.file:
            (tmp_path / block.file).write_text(block.code)
            # A file of this name that another test has loaded would give the module another name,
            # and its logger too.
            monkeypatch.delitem(
                sys.modules, block.file.removesuffix(".py").replace("/", "."), raising=False
            )
    app = create_app(version="3f0c1d2e4b5a")
    async with app.router.lifespan_context(app):
        service: BatchService = app.state.batch
        async with get_db() as db:
            db.add_all([User(email="ann@example.com"), User(email="bad address")])
            await db.commit()
        await Backups(service.operations.context).create()
        made = await access.create_token(service.operations.context, "ann", "admin")
        async with client_of(app, made.secret) as admin, client_of(app) as nobody:
            yield Reader(app, service, admin, nobody, {YOURS: made.secret})


@pytest.mark.rest
async def test_each_example_is_answered_as_it_is_shown(reader: Reader) -> None:
    assert len(EXAMPLES) > 40
    for request, shown in EXAMPLES:
        try:
            await reader.play(request, shown)
        except AssertionError as error:
            raise AssertionError(f"{request.start}\n{error}") from None


def test_an_answer_that_is_not_as_it_is_shown_would_be_seen() -> None:
    compare = Reader(None, None, None, None).compare  # type: ignore[arg-type]
    shown: Any = {"n": 1, "list": [{"a": None}], "state": "failed", MORE: MORE}
    compare(shown, {"n": 2.5, "list": [{"a": None}], "state": "failed", "other": 1}, "")
    for wrong in (
        {**shown, "n": "1", "other": 1},
        {**shown, "n": True, "other": 1},
        {**shown, "list": [], "other": 1},
        {**shown, "list": [{"a": None, "b": 1}], "other": 1},
        {**shown, "list": [{"a": 1}], "other": 1},
        {**shown, "state": "queued", "other": 1},
        {"n": 1, "state": "failed", "other": 1},
    ):
        found = {name: value for name, value in wrong.items() if name != MORE}
        with pytest.raises(AssertionError):
            compare(shown, found, "")
