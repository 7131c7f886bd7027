"""Runs that wait, in a real service with its loops: what waits begins soon, and groups grow while
they run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from batch_system import Start, clock, config, start, start_all
from batch_system.config import get_settings
from batch_system.server.service import BatchService
from tests.batch.ledger_world import make_task, rows, until
from tests.waiting.world import MINUTE


@pytest.fixture
async def service(ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[BatchService]:
    """A service that is not started yet, so that a test registers its tasks before."""
    monkeypatch.setenv("LEDGER_URL", ledger_url)
    monkeypatch.setenv("POLL_SECONDS", "0.05")
    monkeypatch.setenv("DRAIN_SECONDS", "0.2")
    config.forget_settings()
    batch = BatchService(get_settings())
    yield batch
    await batch.stop()


async def ended(service: BatchService, task: str, state: str = "succeeded") -> dict[str, Any]:
    found = await until(lambda: rows(service.ledger, task=task, state=state))
    return dict(found[0])


async def test_a_follow_up_begins_when_its_group_has_ended(service: BatchService) -> None:
    mail, report = make_task("mail", None, overlap="allow"), make_task("report", None)
    await service.start()
    await start_all([Start(mail.cls) for _ in range(20)], then=Start(report.cls))
    last = max([row["finished_at"] for row in await until(lambda: twenty(service))])
    assert (await ended(service, "report"))["started_at"] >= last


async def twenty(service: BatchService) -> list[dict[str, Any]]:
    found = await rows(service.ledger, task="mail", state="succeeded")
    return found if len(found) == 20 else []


async def test_a_slot_begins_when_the_slot_that_it_waits_for_has_succeeded(
    service: BatchService,
) -> None:
    order: list[str] = []

    async def extract(self: object) -> None:
        order.append("extract")

    async def load(self: object) -> None:
        order.append("load")

    make_task("extract", "* * * * *", run=extract)
    make_task("load", None, run=load, after="extract")
    await service.start()
    clock.advance(MINUTE)
    for name in ("load", "extract"):
        service.dispatcher.notify(name)
    row = await ended(service, "load")
    assert order == ["extract", "load"]
    assert row["slot"] == (await ended(service, "extract"))["slot"]


async def test_a_run_for_a_later_instant_begins_then(service: BatchService) -> None:
    mail = make_task("mail", None)
    await service.start()
    await start(mail.cls, delay=60)
    assert [row["state"] for row in await rows(service.ledger)] == ["waiting"]
    clock.advance(MINUTE)
    await ended(service, "mail")


async def test_a_member_that_runs_lets_others_join_its_group(service: BatchService) -> None:
    """Also the follow-up of an inner group, which is active while it waits."""

    async def run(self: object, depth: int) -> None:
        if depth:
            await start(mail.cls, depth=0, in_group=True)
            inner = [Start(mail.cls, depth=0), Start(mail.cls, depth=0)]
            await start_all(inner, then=Start(part.cls), in_group=True)

    mail = make_task("mail", None, run=run, overlap="allow")
    part, report = make_task("part", None), make_task("report", None)
    await service.start()
    outer = await start_all([Start(mail.cls, depth=1)], then=Start(report.cls))
    follow_up = await ended(service, "report")
    inner = await ended(service, "part")
    assert follow_up["id"] == outer
    assert inner["awaited_by"] == outer
    assert follow_up["started_at"] >= inner["finished_at"]
    members = await rows(service.ledger, task="mail")
    assert sorted(row["awaited_by"] for row in members) == sorted(
        [outer, outer, inner["id"], inner["id"]]
    )
    assert all(row["parent"] == members[0]["id"] for row in members[1:])


async def test_a_run_that_is_in_no_group_can_let_nothing_join(service: BatchService) -> None:
    async def run(self: object) -> None:
        await start(mail.cls, in_group=True)

    mail = make_task("mail", None, run=run)
    await service.start()
    await start(mail.cls)
    assert "is no member of a group" in (await ended(service, "mail", "failed"))["reason"]


async def test_another_node_finds_what_a_node_that_died_has_left(service: BatchService) -> None:
    """The outcome is written without a look, as by a node that dies right after its commit."""
    mail, report = make_task("mail", None), make_task("report", None)
    await service.start()
    service.opener.on_ended = lambda _: None  # type: ignore[method-assign]
    service.engine._on_ended = lambda _: None
    await start_all([Start(mail.cls)], then=Start(report.cls))
    await ended(service, "report")
