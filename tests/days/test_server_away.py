"""PostgreSQL is away: for longer than each timer of a service, and again and again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from batch_system.testing.databases import wait_for
from batch_system.testing.postgres import OwnServer
from tests.days.story import MISSED, Story, down

pytestmark = pytest.mark.days

AWAY_SECONDS = float(os.environ.get("AWAY_SECONDS", "130"))
"""Longer than two leases and a missed slot. `make faults` takes ten minutes."""


def test_the_server_is_away_for_130_seconds(server: OwnServer, tmp_path: Path) -> None:
    with Story(tmp_path / "story", {"DATABASE_URL": wait_for(server.create_database())}) as story:
        story.start("a", "b")
        story.until(lambda: len(story.ended_since(0)) == 12, 30, "all twelve tasks run")
        server.stop("immediate")
        story.wait(AWAY_SECONDS - 20)
        for node in story.nodes.values():
            assert node.get("/healthz").status_code == 200
            reasons = node.readiness() or {}
            assert reasons["ledger"].startswith("it can't be used since ")
            assert "lease" in reasons
        assert "can't be used" in story.batch("status", code=None)
        story.wait(20)
        server.start()
        story.check_end()
        story.check_told(down("its server can't be reached"), headline=MISSED)
        for node in story.nodes.values():
            begins = [line for line in node.said.splitlines() if "the ledger can't be used" in line]
            ends = [
                line for line in node.said.splitlines() if "the ledger is reachable again" in line
            ]
            assert (len(begins), len(ends)) == (1, 1), node.said


def test_the_server_is_restarted_ten_times_at_once(server: OwnServer, tmp_path: Path) -> None:
    with Story(tmp_path / "story", {"DATABASE_URL": wait_for(server.create_database())}) as story:
        story.start("a", "b")
        story.until(lambda: len(story.ended_since(0)) == 12, 30, "all twelve tasks run")
        for number in range(10):
            server.restart("immediate" if number % 2 else "fast")
            story.wait(2 + number)
        story.check_end()
        story.check_told()  # no slot was missed
