"""PostgreSQL is away: for longer than each timer of a service, and again and again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.testing.databases import wait_for
from service.testing.postgres import OwnServer, find_binaries
from tests.days.story import Story

pytestmark = pytest.mark.days


@pytest.fixture
def server() -> Iterator[OwnServer]:
    with OwnServer(find_binaries(), fast=True) as server:
        yield server


def test_the_server_is_away_for_130_seconds(server: OwnServer, tmp_path: Path) -> None:
    with Story(tmp_path / "story", {"DATABASE_URL": wait_for(server.create_database())}) as story:
        story.start("a", "b")
        story.until(lambda: len(story.ended_since(0)) == 12, 30, "all twelve tasks run")
        server.stop("immediate")
        story.wait(100)
        for node in story.nodes.values():
            assert node.get("/healthz").status_code == 200
            assert "it can't be used" in str(node.readiness()), node.readiness()
        story.wait(30)
        server.start()
        story.check_end()
        print(story.told(), story.status(), story.batch("nodes"), story.night["sentence"], story.logs())
