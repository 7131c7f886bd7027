"""The operations over the API: what is followed there, and what answers and is not the service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import httpx
import pytest

from batch_system import clock
from batch_system.errors import BatchError, InvalidParameters
from batch_system.operations.asking.filter import RunFilter
from batch_system.remote import connection as remote_connection
from batch_system.remote.connection import Connection
from batch_system.remote.operations import RemoteOperations, remote_operations
from batch_system.verbs import following
from batch_system.verbs.access import ListChanges
from batch_system.verbs.bulks import BeginBackfill, BeginBulk, PreviewBackfill, PreviewBulk
from batch_system.verbs.night import ShowStatus
from batch_system.verbs.run_changes import CancelRun, RetryRun, StartRun
from batch_system.verbs.tasks import PauseTask, ResumeTask
from tests.web.conftest import Served


@pytest.fixture
def remote(served: Served) -> RemoteOperations:
    return RemoteOperations(Connection(served.admin, "http://localhost"))


async def test_what_goes_on_in_a_service_is_followed_to_its_end(
    served: Served, remote: RemoteOperations
) -> None:
    asked = StartRun(name="report", parameters={"day": "never"}, key="once")
    started = await remote(asked)
    assert (await remote(asked)).id == started.id
    states = [row.state async for row in following.follow(remote, started.id)]
    assert states[-1] == "failed"
    blocks = [block async for block in following.log(remote, "report")]
    assert blocks[-1] == "failed" and "there is no such day" in str(
        [vars(line) for line in blocks[0].lines]
    )
    await remote(PauseTask(name="report", note="a break"))
    assert (await remote(RetryRun(run=started.id, note="again"))).state == "queued"
    assert (await remote(CancelRun(run=started.id))).state == "cancelled"
    preview = await remote(PreviewBulk(action="retry", filter=RunFilter.of(state=["cancelled"])))
    begun = await remote(BeginBulk(preview=preview.id))
    done = await following.carried_out(remote, begun, lambda _: None)
    assert done.changed == 1
    day = clock.now() - timedelta(days=2)
    backfill = await remote(PreviewBackfill(name="report", since=day, until=clock.now()))
    assert backfill.counts is not None and backfill.counts.new == 2
    bulk = await remote(BeginBackfill(name="report", preview=backfill.id))
    assert (await following.carried_out(remote, bulk, lambda _: None)).changed == 2
    assert (await remote(ResumeTask(name="report"))).ended is not None
    changes = (await served.operations(ListChanges(limit=200))).changes
    mine = {each.action for each in changes if (each.actor, each.source) == ("admin", "api")}
    assert {"run.start", "task.pause", "run.retry", "run.cancel"} <= mine
    assert {"bulk.retry", "bulk.backfill"} <= mine


def test_what_needs_the_machine_is_refused(remote: RemoteOperations) -> None:
    with pytest.raises(InvalidParameters, match="without --url"):
        _ = remote.context


async def test_a_token_that_is_not_valid_or_not_allowed_is_told(served: Served) -> None:
    served.nobody.headers["Authorization"] = "Bearer wrong"
    with pytest.raises(BatchError, match="see --token-file") as refused:
        await RemoteOperations(Connection(served.nobody, "http://localhost"))(ShowStatus())
    assert refused.value.kind == "forbidden"
    with pytest.raises(BatchError, match="needs the role operator"):
        await RemoteOperations(Connection(served.viewer, "http://localhost"))(
            PauseTask(name="report")
        )


async def answering(status: int, content: bytes, media_type: str) -> AsyncIterator[Any]:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, content=content, headers={"Content-Type": media_type})

    async with httpx.AsyncClient(
        transport=httpx.MockTransport(answer), base_url="http://elsewhere"
    ) as client:
        yield RemoteOperations(Connection(client, "http://elsewhere"))


@pytest.mark.parametrize(
    ("status", "content"),
    [
        (200, b"<html>"),
        (200, b"{}"),
        (500, b"oops"),
        (404, b"\x1b[31m"),
        (302, b""),
        (200, b"[" * 100_000),
    ],
)
async def test_what_answers_and_is_not_the_service_is_named(status: int, content: bytes) -> None:
    async for operations in answering(status, content, "text/html"):
        with pytest.raises(BatchError, match="what answers at http://elsewhere is not") as refused:
            await operations(ShowStatus())
        assert refused.value.kind == "unavailable"
        assert "\x1b" not in refused.value.message


async def test_an_answer_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_connection, "LARGEST_ANSWER", 1_000)
    async for operations in answering(200, b" " * 10_000, "application/json"):
        with pytest.raises(BatchError, match="more than 1,000 bytes"):
            await operations(ShowStatus())


@pytest.mark.parametrize(
    "url",
    ["", "example", "ftp://example", "http://ann:pw@example", "http://", "http://ü", "x" * 99],
)
async def test_a_url_that_can_t_be_one_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidParameters, match="allowed: http://HOST") as refused:
        async with remote_operations(url, None):
            pass
    assert "pw" not in refused.value.message


async def test_a_service_that_does_not_answer_is_unavailable() -> None:
    async with remote_operations("http://127.0.0.1:9", "secret") as operations:
        with pytest.raises(BatchError, match="can't be reached") as refused:
            await operations(ShowStatus())
    assert refused.value.kind == "unavailable"
