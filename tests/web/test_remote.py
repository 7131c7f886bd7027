"""The operations over the API answer as those beside the ledger, and refuse what needs the
machine.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import httpx
import pytest
from service.operations.bulks.facet import Bulks
from service.operations.runs.facet import Runs
from service.operations.slots.facet import Slots
from service.operations.tasks.facet import Tasks

from service import clock
from service.errors import BatchError, InvalidParameters
from service.operations.asking.actor import Actor
from service.operations.asking.filter import RunFilter
from service.operations.bulks import bulk
from service.operations.people import access
from service.operations.people.access import Access
from service.operations.people.changes import Changes
from service.operations.runs import run_log
from service.operations.runs.quarantine import Quarantine
from service.operations.starting import backfill
from service.operations.starting.results import BackfillRequest
from service.operations.system.nodes import Nodes
from service.remote import connection as remote_connection
from service.remote import facets
from service.remote.connection import Connection
from service.remote.operations import RemoteOperations, RemoteSlots, remote_operations
from service.verbs.access import ListChanges, RevokeToken
from service.verbs.bulks import PreviewBulk, ShowBulk
from service.verbs.night import ShowStatus
from service.verbs.run_changes import CancelRun, RetryRun, StartRun
from service.verbs.tasks import PauseTask, ResumeTask
from tests.batch.ledger_world import until
from tests.web.conftest import Served
from tests.web.test_v1 import ended, start


@pytest.fixture
def remote(served: Served) -> RemoteOperations:
    return RemoteOperations(Connection(served.admin, "http://localhost"))


async def test_reads_answer_what_they_answer_beside_the_ledger(
    served: Served, remote: RemoteOperations
) -> None:
    run = await start(served, parameters={"day": "never"})
    await ended(served.viewer, run)
    since = clock.now() - timedelta(hours=1)
    here = served.operations.by(Actor("admin"))

    async def is_noticed() -> bool:
        """The watch of the service does that within a second, so the two answers could differ until
        then.
        """
        return (await here.runs.show(run)).noticed_at is not None

    await until(is_noticed)
    reads: list[Callable[[Any], Awaitable[Any]]] = [
        lambda o: o.tasks.list(with_others=True),
        lambda o: o.tasks.pause_of("report"),
        lambda o: o.runs.list(RunFilter.of(state=["failed"])),
        lambda o: o.runs.list(RunFilter.of(task="report"), by_slot=True),
        lambda o: o.runs.find(run[-8:]),
        lambda o: o.runs.find("report"),
        lambda o: o.runs.show(run),
        lambda o: o.runs.log_page(run, limit=1),
        lambda o: o.quarantine.list(),
        lambda o: o.quarantine.list(run),
        lambda o: o.nodes.has("report"),
        lambda o: o.nodes.has("nope"),
        lambda o: o.changes.list(5, action="run.start", since=since),
        lambda o: o.slots.account(since, clock.now()),
        lambda o: o.slots.leave(since, clock.now(), dry_run=True),
        lambda o: o.slots.leave(since, clock.now(), "seen", "report", 0),
        lambda o: o.slots.reopen(since, clock.now(), "report"),
        lambda o: o.backups.list(lambda _: None),
        lambda o: o.access.tokens(),
    ]
    for read in reads:
        there, beside = await read(remote), await read(here)
        assert _comparable(there) == _comparable(beside), inspect.getsource(read)


def _comparable(answer: Any) -> Any:
    """The answer as JSON, without what changes from one moment to the next."""
    if isinstance(answer, list | tuple) and not hasattr(answer, "_fields"):
        return [_comparable(item) for item in answer]
    if not hasattr(answer, "model_dump"):
        return answer
    values = answer.model_dump(mode="json")
    text = json.dumps(values, sort_keys=True)
    moving = {"beats", "seen_at", "loop_lag", "used_at", "used_from", "now", "until"}
    return json.loads(
        text, object_hook=lambda each: {k: v for k, v in each.items() if k not in moving}
    )


async def test_changes_are_made_by_the_holder_of_the_token(
    served: Served, remote: RemoteOperations
) -> None:
    started = await remote(StartRun(name="report", parameters={"day": "never"}, key="once"))
    assert (
        await remote(StartRun(name="report", parameters={"day": "never"}, key="once"))
    ).id == started.id
    states = [row.state async for row in remote.runs.follow(started.id)]
    assert states[-1] == "failed"
    blocks = [block async for block in run_log.blocks(remote.context, "report")]
    assert blocks[-1] == "failed" and "there is no such day" in str(
        [vars(line) for line in blocks[0].lines]
    )
    await remote(PauseTask(name="report", note="a break"))
    assert (await remote(RetryRun(run=started.id, note="again"))).state == "queued"
    assert (await remote(CancelRun(run=started.id))).state == "cancelled"
    preview = await remote(PreviewBulk(action="retry", filter=RunFilter.of(state=["cancelled"])))
    await bulk.begin(remote.context, preview.id, "bulk")
    await bulk.carry_out(remote.context, preview.id)
    assert (await remote(ShowBulk(preview=preview.id))).changed == 1
    day = clock.now() - timedelta(days=2)
    counts = await backfill.run(remote.context, BackfillRequest("report", day, clock.now()))
    assert counts.new == 2
    assert (await remote(ResumeTask(name="report"))).ended is not None
    made = await access.create_token(remote.context, "laptop", "viewer", timedelta(days=3))
    assert (await remote(RevokeToken(name="laptop"))).id == made.id
    changes = (await served.operations(ListChanges(limit=200))).changes
    mine = [
        change.action for change in changes if change.actor == "admin" and change.source == "api"
    ]
    assert {
        "run.start",
        "task.pause",
        "run.retry",
        "run.cancel",
        "bulk.retry",
        "bulk.backfill",
    } <= set(mine)


@pytest.mark.parametrize(
    ("kind", "ask"),
    [
        ("not_found", lambda o: o.tasks.show("nope")),
        ("not_found", lambda o: o.runs.show("0" * 32)),
        ("invalid", lambda o: o.runs.start("report", {"nope": 1})),
        ("invalid", lambda o: o.backups.create()),
        ("invalid", lambda o: o.migrations.list()),
        ("invalid", lambda o: o.slots.account(clock.now(), on_slot=print)),
    ],
)
async def test_errors_have_the_kind_that_they_have_beside_the_ledger(
    remote: RemoteOperations, kind: str, ask: Callable[[Any], Awaitable[Any]]
) -> None:
    with pytest.raises(BatchError) as refused:
        await ask(remote)
    assert refused.value.kind == kind


async def test_a_token_that_is_not_valid_or_not_allowed_is_told(served: Served) -> None:
    served.nobody.headers["Authorization"] = "Bearer wrong"
    with pytest.raises(BatchError, match="see --token-file") as refused:
        await RemoteOperations(Connection(served.nobody, "http://localhost")).status()
    assert refused.value.kind == "forbidden"
    with pytest.raises(BatchError, match="needs the role operator"):
        await RemoteOperations(Connection(served.viewer, "http://localhost")).tasks.pause("report")


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


def test_each_method_has_the_signature_of_the_facet_beside_the_ledger() -> None:
    pairs = {
        facets.RemoteTasks: Tasks,
        facets.RemoteRuns: Runs,
        facets.RemoteBulks: Bulks,
        RemoteSlots: Slots,
        facets.RemoteQuarantine: Quarantine,
        facets.RemoteNodes: Nodes,
        facets.RemoteAccess: Access,
        facets.RemoteChanges: Changes,
    }
    for remote_facet, facet in pairs.items():
        for name, method in inspect.getmembers(remote_facet, inspect.isfunction):
            if name.startswith("_"):
                continue
            theirs, ours = (
                list(inspect.signature(f).parameters) for f in (method, getattr(facet, name))
            )
            assert theirs == ours or theirs[-1] == "conditions", (remote_facet.__name__, name)
