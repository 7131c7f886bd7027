"""The page on security: its proxy and its SQL work, and its rows about streams and lost tokens
hold.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from batch_system.app import create_app
from batch_system.config import forget_settings
from batch_system.operations.people.access import create_token
from batch_system.operations.runs.change import prune
from batch_system.settings.urls import async_url
from batch_system.testing.postgres import PostgresServer
from batch_system.verbs.access import RevokeToken
from batch_system.web import access, events, live
from tests.batch.ledger_world import until
from tests.docs_blocks import blocks, read
from tests.web.conftest import Served, client_of, served
from tests.web.test_access import with_settings

__all__ = ["served"]

PAGE = "docs/security.md"


# The proxy that signs people in.


def test_each_row_of_a_threat_names_its_tests() -> None:
    table = read(PAGE).split("## Threats")[1].split("\n## ")[0]
    threats = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(threats) > 15
    assert [
        line for line in threats if not re.search(r"\| (`tests/[\w/]+\.py`(, )?)+ \|$", line)
    ] == []


async def test_the_proxy_of_the_page_names_people_and_no_client_can(served: Served) -> None:
    [settings] = (block.code for block in blocks(read(PAGE), "ini"))
    app = with_settings(served, **dict(line.split("=", 1) for line in settings.splitlines()))
    sent = dict(re.findall(r"proxy_set_header +(\S+) (\S+);", read(PAGE)))
    values = {"$host": "batch.example.com", "$scheme": "https", "$remote_addr": "203.0.113.5"}

    async def ask(user: str, method: str, path: str, **of_client: str) -> int:
        """As nginx passes it on: what it sets replaces what the client has sent, and an empty value
        removes it.
        """
        set_by_proxy = {
            name: {**values, "$remote_user": user}.get(value, "") for name, value in sent.items()
        }
        headers = {**of_client, **set_by_proxy}
        passed_on = {name: value for name, value in headers.items() if value}
        return (await client.request(method, f"/api/v1{path}", headers=passed_on)).status_code

    client = client_of(app)
    origin = {"Origin": "https://batch.example.com"}
    assert await ask("bob", "GET", "/session", Authorization="Basic Ym9iOng=") == 200
    assert await ask("bob", "POST", "/tasks/report/pause", **origin) == 403
    assert await ask("ann", "POST", "/tasks/report/pause", **origin) == 200
    assert await ask("ann", "POST", "/tasks/report/resume", Origin="https://evil.example") == 403
    forged = {"X-Forwarded-User": "ann", "X-Forwarded-For": "127.0.0.1"}
    assert await ask("bob", "POST", "/tasks/report/resume", **origin, **forged) == 403
    changes = (await served.viewer.get("/api/v1/changes?action=task.pause")).json()["changes"]
    assert [(change["actor"], change["address"]) for change in changes] == [("ann", "203.0.113.5")]
    elsewhere = client_of(app, host="10.1.2.3")
    headers = {"Host": "localhost", "X-Forwarded-User": "ann"}
    assert (await elsewhere.get("/api/v1/session", headers=headers)).status_code == 401


# The role that may only add events.


async def test_with_the_privileges_of_the_page_the_service_works_and_can_only_add_to_the_audit(
    postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = await postgres_server.create_database()
    [sql] = (block.code for block in blocks(read(PAGE), "sql"))
    role = f"batch_service_{make_url(owner).database[-8:]}"  # type: ignore[index]
    async with _started(monkeypatch, owner):
        pass
    owners = create_async_engine(async_url(owner))
    async with owners.begin() as connection:
        for statement in re.sub(r"\bbatch_service\b", role, sql).split(";\n"):
            if statement.strip():
                await connection.execute(text(statement))
    url = (
        make_url(owner)
        .set(username=role, password="change-me")
        .render_as_string(hide_password=False)
    )
    monkeypatch.setenv("BATCH_KEEP_EVENTS_DAYS", "36500")
    try:
        async with _started(monkeypatch, url) as app:
            operations = app.state.batch.operations
            secret = (await create_token(operations.context, "ann", "admin")).secret
            client = client_of(app, secret)
            assert (await client.post("/api/v1/tasks/hello/runs", json={})).status_code == 202
            await until(lambda: _succeeded(client))
            assert (await client.post("/api/v1/tasks/hello/pause")).status_code == 200
            await prune(operations.context)
            for change in (
                "UPDATE batch_events SET actor = 'eve'",
                "DELETE FROM batch_events",
                "TRUNCATE batch_events",
            ):
                with pytest.raises(DBAPIError, match="permission denied"):
                    async with app.state.batch.ledger.engine.begin() as connection:
                        await connection.execute(text(change))
            actions = {
                change["action"]
                for change in (await client.get("/api/v1/changes")).json()["changes"]
            }
            assert {"run.start", "task.pause", "token.create", "service.start"} <= actions
    finally:
        await owners.dispose()
        await postgres_server.drop_database(owner)
        await postgres_server._execute(f"DROP ROLE {role}")


HELLO = """
from batch_system import BaseTask

class Hello(BaseTask):
    name, schedule = "hello", "0 3 * * *"
    async def run(self): pass
"""


@asynccontextmanager
async def _started(monkeypatch: pytest.MonkeyPatch, url: str) -> AsyncIterator[Any]:
    Path("tasks/hello.py").write_text(HELLO)
    monkeypatch.setenv("DATABASE_URL", url)
    forget_settings()
    app = create_app()
    async with app.router.lifespan_context(app):
        yield app


async def _succeeded(client: Any) -> bool:
    return [run["state"] for run in (await client.get("/api/v1/runs")).json()["runs"]] == [
        "succeeded"
    ]


# Streams.


class Stream:
    """An open stream of events, read in this process."""

    def __init__(
        self, app: Any, secret: str, topic: str = "tasks", last_id: str | None = None
    ) -> None:
        self.received = bytearray()
        headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {secret}".encode())]
        headers += [(b"last-event-id", last_id.encode())] if last_id is not None else []
        self._gone = asyncio.Event()
        scope = {
            "type": "http",
            "method": "GET",
            "scheme": "http",
            "path": "/api/v1/events",
            "raw_path": b"/api/v1/events",
            "query_string": f"topic={topic}".encode(),
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 1234),
            "server": ("localhost", 80),
            "http_version": "1.1",
            "state": {},
        }
        self.ending = asyncio.create_task(app(scope, self._receive, self._send))

    async def has(self, text: str) -> None:
        await until(lambda: self._has(text.encode()), 20)

    async def close(self) -> None:
        self._gone.set()
        await asyncio.wait_for(self.ending, 10)

    async def _has(self, text: bytes) -> bool:
        return text in self.received

    async def _receive(self) -> dict[str, Any]:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.received.extend(message.get("body", b""))


@pytest.mark.rest
async def test_a_stream_ends_when_its_token_is_revoked_and_when_the_service_stops(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "KNOWN_SECONDS", 0.1)
    made = await create_token(served.operations.context, "laptop", "viewer")
    revoked, stopped = (
        Stream(served.service_app, made.secret),
        Stream(served.service_app, served.secrets["viewer"]),
    )
    await revoked.has("retry: ")
    await stopped.has("retry: ")
    await served.operations(RevokeToken(name="laptop"))
    await asyncio.wait_for(revoked.ending, 10)
    assert not stopped.ending.done()
    served.service.stopping.set()
    await asyncio.wait_for(stopped.ending, 10)


@pytest.mark.rest
async def test_a_stream_tells_what_changes_and_continues_after_its_last_event(
    served: Served,
) -> None:
    secret = served.secrets["viewer"]
    first = Stream(served.service_app, secret)
    await first.has("retry: ")
    feed = served.service_app.guard.feed  # type: ignore[attr-defined]

    async def has_looked() -> bool:
        return "tasks" in feed._last  # only later looks are compared with it

    await until(has_looked)
    await served.operator.post("/api/v1/tasks/report/pause")
    await first.has("event: task")
    last_id = re.findall(r"^id: (\S+)$", first.received.decode(), re.MULTILINE)[-1]
    other = Stream(served.service_app, secret)
    await served.operator.post("/api/v1/tasks/report/resume")
    await other.has("event: task")
    await first.close()
    again = Stream(served.service_app, secret, last_id=last_id)
    await again.has('"paused":false')
    lost = Stream(served.service_app, secret, last_id="another-process.3")
    await lost.has("event: reload")
    for stream in (other, again, lost):
        await stream.close()


@pytest.mark.rest
async def test_the_number_of_streams_is_limited(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MOST_STREAMS_OF_ONE", 1)
    monkeypatch.setattr(events, "PING_SECONDS", 0.5)
    first = Stream(served.service_app, served.secrets["viewer"])
    await first.has(": ping")
    refused = await served.viewer.get("/api/v1/events?topic=tasks")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    second = Stream(served.service_app, served.secrets["operator"])
    await second.has("retry: ")
    await first.close()
    await second.close()
