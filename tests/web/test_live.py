"""Live events of a service in this process, over real connections: what is told, missed, resumed
and bounded.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import event, insert, update

from batch_system import clock
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import new_id, nodes, runs
from batch_system.operations.asking.actor import Actor
from batch_system.operations.asking.context import Context
from batch_system.operations.people import access
from batch_system.operations.people import access as people_access
from batch_system.operations.system.live import NEWEST
from batch_system.server.connections import Connections
from batch_system.verbs.access import RevokeToken
from batch_system.web.stream import MOST_WAITING_BYTES
from tests.batch.ledger_world import until
from tests.web.conftest import Served
from tests.web.streams import EVENTS, Server, listening

OFTEN = 0.05
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For what happens in this process and not in the database."""


@pytest.fixture
async def site(served: Served) -> AsyncIterator[Server]:
    site = Server(served.service_app, Connections(limit=200))
    await site.open()
    yield site
    await site.close()


@pytest.fixture
async def viewer(site: Server, served: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with site.client(served.secrets["viewer"]) as client:
        yield client


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger is read more often, so that a test waits less."""
    monkeypatch.setattr("batch_system.web.live.LOOK_SECONDS", OFTEN)


def queued(seconds: float = 0.0, **columns: Any) -> dict[str, Any]:
    """A row of a run that no service executes. The larger `seconds`, the newer it is."""
    at = clock.now() - timedelta(hours=1) + timedelta(seconds=seconds)
    return {**vars(NewRun.queued("elsewhere", None, at, exclusive=None, priority=0)), **columns}


async def add(served: Served, *rows: dict[str, Any]) -> None:
    async with served.service.ledger.engine.begin() as connection:
        await connection.execute(insert(runs), list(rows))


async def change(served: Served, *ids: str, **values: Any) -> None:
    async with served.service.ledger.engine.begin() as connection:
        await connection.execute(update(runs).where(runs.c.id.in_(ids)).values(**values))


async def start(served: Served) -> str:
    return str((await served.operator.post("/api/v1/tasks/report/runs", json={})).json()["id"])


async def when(condition: Callable[[], object]) -> None:
    async def holds() -> object:
        return condition()

    await until(holds)


@pytest.mark.usefixtures("looks_often")
async def test_a_stream_tells_what_changes_in_its_topics_and_nothing_else(
    served: Served, viewer: httpx.AsyncClient
) -> None:
    watched, other = queued(), queued(1)
    await add(served, watched, other)
    async with (
        listening(viewer, "runs", "tasks") as lists,
        listening(viewer, f"run:{watched['id']}") as one,
        listening(viewer, "nodes") as processes,
    ):
        run = await start(served)
        assert (await lists.until("run", id=run, state="succeeded")).data["task"] == "report"
        await served.operator.post("/api/v1/tasks/report/pause")
        assert (await lists.until("task", paused=True)).data["name"] == "report"
        await change(served, other["id"], message="not watched")
        await change(served, watched["id"], message="日本語\nsecond line")
        told = await one.next()
        assert (told.name, told.data["id"], told.data["message"]) == (
            "run",
            watched["id"],
            "日本語\nsecond line",
        )
        async with served.service.ledger.engine.begin() as connection:
            row = (await connection.execute(nodes.select())).mappings().one()
            await connection.execute(
                insert(nodes), {**row, "id": (other_node := new_id()), "pid": 1}
            )
        assert (await processes.next()).data["id"] == other_node
        async with served.service.ledger.engine.begin() as connection:
            stopped = update(nodes).where(nodes.c.id == other_node).values(stopped_at=clock.now())
            await connection.execute(stopped)
        told = await processes.next()
        assert told.data["id"] == other_node and told.data["stopped_at"] is not None
        assert one.answer.headers["content-type"] == "text/event-stream; charset=utf-8"


@on_sqlite
@pytest.mark.usefixtures("looks_often")
async def test_a_client_that_comes_back_gets_what_it_has_missed(
    served: Served, viewer: httpx.AsyncClient
) -> None:
    row = queued()
    await add(served, row)
    async with listening(viewer, "runs") as before, listening(viewer, "tasks"):
        pass
    async with listening(viewer, "tasks") as other:
        await change(served, row["id"], message="missed")
        await served.operator.post("/api/v1/tasks/report/pause")
        await other.until("task", paused=True)
    async with listening(viewer, "runs", last_id=before.start.id) as again:
        told = await again.next()
        assert (told.name, told.data["message"]) == ("run", "missed")
        await change(served, row["id"], message="new")
        told = await again.next()
        assert (told.name, told.data["message"]) == ("run", "new")
    async with listening(viewer, "runs", last_id=told.id) as nothing_missed:
        await change(served, row["id"], message="newest")
        assert (await nothing_missed.next()).data["message"] == "newest"


@on_sqlite
@pytest.mark.usefixtures("looks_often")
async def test_a_client_that_may_have_missed_something_is_told_to_reload(
    served: Served, viewer: httpx.AsyncClient
) -> None:
    async with listening(viewer, "runs") as stream:
        process, _, number = str(stream.start.id).rpartition(".")
        ids = [
            f"{new_id()}.{number}",
            f"{process}.{int(number) + 1000}",
            f"{process}.-1",
            f"{process}.1e9",
            "",
            "x",
        ]
        for last_id in ids:
            async with listening(viewer, "runs", last_id=last_id) as again:
                assert (await again.next()).name == "reload", last_id
        async with listening(viewer, "runs", "nodes", last_id=stream.start.id) as wider:
            told = await wider.next()
            assert told.name == "reload", "nobody has watched the nodes before"
        async with listening(viewer, "runs", "nodes", last_id=told.id) as again:
            await add(served, row := queued())
            assert (await again.next()).data["id"] == row["id"]


@on_sqlite
@pytest.mark.usefixtures("looks_often")
async def test_a_client_that_comes_back_after_nobody_has_watched_is_told_to_reload(
    served: Served, viewer: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batch_system.web.live.LINGER_SECONDS", 0.0)
    row = queued()
    await add(served, row)
    async with listening(viewer, "runs") as stream:
        await change(served, row["id"], message="seen")
        told = await stream.next()
    feed = served.service_app.guard.feed  # type: ignore[attr-defined]
    await when(lambda: feed._reader.done())
    await change(served, row["id"], message="missed")
    async with listening(viewer, "runs"), listening(viewer, "runs", last_id=told.id) as again:
        assert (await again.next()).name == "reload"
        await change(served, row["id"], message="new")
        assert (await again.next()).data["message"] == "new"


@pytest.mark.usefixtures("looks_often")
async def test_the_end_of_a_run_is_told_also_when_many_newer_ones_are_there(
    served: Served, viewer: httpx.AsyncClient
) -> None:
    old = queued()
    await add(served, old)
    async with listening(viewer, "runs") as stream:
        for number in range(1, 4):
            newer = [
                queued(1000 * number + n, state=RunState.SUCCEEDED) for n in range(NEWEST // 2)
            ]
            await add(served, *newer)
            await stream.until("run", id=newer[-1]["id"])
        await change(served, old["id"], state=RunState.CANCELLED)
        await stream.until("run", id=old["id"], state="cancelled")


@on_sqlite
@pytest.mark.usefixtures("looks_often")
async def test_more_new_runs_than_a_look_sees_are_a_reload(
    served: Served, viewer: httpx.AsyncClient
) -> None:
    async with listening(viewer, "runs") as stream:
        await add(served, *(queued(n, state=RunState.SUCCEEDED) for n in range(NEWEST + 50)))
        assert (await stream.next()).name == "reload"
        row = queued(1000)
        await add(served, row)
        assert (await stream.next()).data["id"] == row["id"]


@on_sqlite
async def test_any_number_of_streams_read_the_ledger_once_a_second(
    served: Served, viewer: httpx.AsyncClient
) -> None:
    statements: Counter[str] = Counter()

    def count(connection: Any, cursor: Any, statement: str, *others: Any) -> None:
        statements["looks"] += "stopped_at IS NULL OR" in statement
        statements["tokens"] += "batch_tokens" in statement and "max(batch_tokens" not in statement

    engine = served.service.ledger.reader.sync_engine
    async with AsyncExitStack() as stack:
        for _ in range(45):
            await stack.enter_async_context(listening(viewer, "nodes"))
        event.listen(engine, "before_cursor_execute", count)
        stack.callback(event.remove, engine, "before_cursor_execute", count)
        began = clock.monotonic()
        await when(lambda: statements["looks"] >= 2)
        seconds = clock.monotonic() - began
    assert seconds > 0.9
    assert statements["tokens"] <= 1


@on_sqlite
async def test_a_stream_ends_at_once_when_the_service_stops(
    served: Served, viewer: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batch_system.web.events.CHECK_SECONDS", 30.0)
    monkeypatch.setattr("batch_system.web.events.END_SECONDS", 30.0)
    async with listening(viewer, "runs") as stream:
        served.service.stopping.set()
        assert await stream.rest(within=20) == [], "it waits for the next look at its token"
    answer = await viewer.get(EVENTS, params={"topic": "runs"})
    assert answer.status_code == 503 and "stopping" in answer.json()["detail"]


@on_sqlite
async def test_one_token_has_so_many_streams_and_no_more(served: Served, site: Server) -> None:
    async with AsyncExitStack() as stack:
        clients = {
            r: await stack.enter_async_context(site.client(served.secrets[r]))
            for r in ("viewer", "operator")
        }
        open_ones = [
            await stack.enter_async_context(listening(clients["viewer"], "runs")) for _ in range(50)
        ]
        refused = await clients["viewer"].get(EVENTS, params={"topic": "runs"})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert refused.json()["kind"] == "unavailable"
        async with listening(clients["operator"], "runs"):
            pass
        await open_ones[0].answer.aclose()

        async def is_free() -> bool:
            async with clients["viewer"].stream("GET", EVENTS, params={"topic": "runs"}) as answer:
                return answer.status_code == 200

        await until(is_free)


@on_sqlite
@pytest.mark.usefixtures("looks_often")
async def test_a_slow_client_costs_little_memory_and_is_told_to_reload(
    served: Served, site: Server
) -> None:
    rows = [queued(n) for n in range(100)]
    await add(served, *rows)
    client = site.slow_client(served.secrets["viewer"], "runs")
    with client:
        feed = served.service_app.guard.feed  # type: ignore[attr-defined]
        await when(lambda: any(stream.has_begun for stream in feed._streams))
        (stream,) = feed._streams
        (connection,) = site.connections._open
        most = 0
        for number in range(60):
            if stream._has_missed:
                break
            number_before = feed._number
            await change(served, *(row["id"] for row in rows), message=f"{number} " + "x" * 2_000)
            await when(lambda before=number_before: feed._number > before)  # type: ignore[misc]
            most = max(most, stream._bytes + connection.transport.get_write_buffer_size())
        assert stream._has_missed
        assert 65_000 < most < MOST_WAITING_BYTES + 100_000
        assert feed._kept_bytes <= 2_000_000
        await asyncio.to_thread(read_until, client, b"event: reload")
        await change(served, rows[0]["id"], message="read again")
        await asyncio.to_thread(read_until, client, b"read again")


@on_sqlite
@pytest.mark.usefixtures("looks_often")
async def test_a_client_that_reads_nothing_is_disconnected(served: Served, site: Server) -> None:
    site.connections.unread_seconds = 0.3
    rows = [queued(n) for n in range(100)]
    await add(served, *rows)
    with site.slow_client(served.secrets["viewer"], "runs"):
        feed = served.service_app.guard.feed  # type: ignore[attr-defined]
        await when(lambda: any(stream.has_begun for stream in feed._streams))

        async def is_disconnected() -> bool:
            await change(
                served, *(row["id"] for row in rows), message=f"{clock.monotonic()} " + "x" * 2_000
            )
            return not feed._streams and not site.connections._open

        await until(is_disconnected)


def read_until(client: socket.socket, wanted: bytes) -> None:
    client.settimeout(10)
    received = b""
    while wanted not in received:
        more = client.recv(65_536)
        assert more, "the stream has ended"
        received = received[-1_000:] + more


@on_sqlite
@pytest.mark.usefixtures("looks_often")
@pytest.mark.parametrize("where", ["its process", "another process"])
async def test_an_open_stream_rarely_checks_its_token_and_ends_at_the_next_check_if_it_is_revoked(
    served: Served, site: Server, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr("batch_system.web.access.KNOWN_SECONDS", 0.0)
    made = await access.create_token(served.operations.context, "laptop", "viewer")
    holder, asked = people_access.holder, []

    async def counted(context: Context, secret: str, address: str | None) -> Actor | None:
        asked.append(secret)
        return await holder(context, secret, address)

    monkeypatch.setattr(people_access, "holder", counted)
    monkeypatch.setattr("batch_system.web.events.VALID_SECONDS", 1_000.0)
    async with site.client(made.secret) as client, listening(client, "tasks") as stream:
        for change in ("pause", "resume", "pause", "resume"):
            await served.operator.post(f"/api/v1/tasks/report/{change}")
            await stream.until("task", paused=change == "pause")
        assert asked.count(made.secret) <= 2  # at its begin, and with the first look of the process
        if where == "its process":
            assert (await served.admin.delete("/api/v1/tokens/laptop")).status_code == 200
        else:
            # Nothing in this process is told of it.
            await served.operations(RevokeToken(name="laptop"))
        assert await stream.rest() == []
